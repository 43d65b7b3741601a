"""Files that are at two places and on disk once."""

import errno
import os

import pytest

from recsys.files import link_or_copy


def made(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "large").write_text("large")
    (folder / "deep" / "inside").write_text("inside")
    return folder


def test_a_linked_file_is_on_disk_once(tmp_path):
    source = made(tmp_path / "source")
    (tmp_path / "one").write_text("what was there before")
    link_or_copy(source / "large", tmp_path / "one")
    assert (tmp_path / "one").samefile(source / "large")
    (source / "large").unlink()
    assert (tmp_path / "one").read_text() == "large"


def test_a_folder_is_linked_file_by_file(tmp_path):
    source, target = made(tmp_path / "source"), tmp_path / "target"
    for _ in range(2):  # a second time, as after an interruption
        link_or_copy(source, target)
    assert (target / "deep" / "inside").samefile(source / "deep" / "inside")
    assert sorted(path.name for path in target.rglob("*")) == ["deep", "inside", "large"]


def test_another_file_system_gets_a_copy(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)

    monkeypatch.setattr(os, "link", refuse)
    source = made(tmp_path / "source")
    link_or_copy(source, tmp_path / "target")
    copied = tmp_path / "target" / "deep" / "inside"
    assert copied.read_text() == "inside" and not copied.samefile(source / "deep" / "inside")
    with pytest.raises(FileNotFoundError):
        link_or_copy(source / "nothing", tmp_path / "one")
