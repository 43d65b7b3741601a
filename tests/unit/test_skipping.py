"""A test that is skipped fails, unless ``tests/conftest.py`` lists the reason."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.testing.redis_server import redis_server

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
MODULE = "import pytest\npytest.skip({!r}, allow_module_level=True)\n"
TESTS = """
import pytest

@pytest.fixture
def needed():
    pytest.skip({0!r})

def test_that_skips():
    pytest.skip({0!r})

@pytest.mark.skip(reason={0!r})
def test_with_a_mark():
    pass

def test_with_a_fixture(needed):
    pass

@pytest.mark.xfail(reason="known")
def test_that_is_expected_to_fail():
    raise ValueError

def test_that_passes():
    pass
"""
NO_VALUES = """
@pytest.mark.parametrize("x", [])
def test_without_values(x):
    pass
"""


def outcomes(folder: Path, **files: str) -> tuple[int, dict[str, str], str]:
    """Exit status, outcome by name and output of a run of pytest, under the house's conftest, of these files."""
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = integration\n")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-rA", "--continue-on-collection-errors", "-p", "no:schemathesis"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    lines = re.findall(r"^([A-Z]+) (?:\S+::)?(test_\w+)", done.stdout, re.MULTILINE)
    return done.returncode, {name: outcome for outcome, name in lines}, done.stdout


def test_listed_reasons_pass(tmp_path: Path) -> None:
    reason = "this kind reads no files"
    status, found, said = outcomes(tmp_path, test_module=MODULE.format(reason), test_others=TESTS.format(reason))
    assert status == pytest.ExitCode.OK, said
    assert found == {"test_that_is_expected_to_fail": "XFAIL", "test_that_passes": "PASSED"}
    assert "1 passed, 4 skipped, 1 xfailed" in said


def test_every_other_reason_fails_and_is_named(tmp_path: Path) -> None:
    reason = "redis-server is not installed"
    files = {"test_module": MODULE.format(reason), "test_others": TESTS.format(reason) + NO_VALUES}
    status, found, said = outcomes(tmp_path, **files)
    assert status == pytest.ExitCode.TESTS_FAILED, said
    assert found == {
        "test_module": "ERROR",
        "test_that_skips": "FAILED",
        "test_with_a_mark": "ERROR",
        "test_with_a_fixture": "ERROR",
        "test_without_values": "ERROR",
        "test_that_is_expected_to_fail": "XFAIL",
        "test_that_passes": "PASSED",
    }
    assert said.count(f"\nskipped: {reason} (MAY_SKIP in tests/conftest.py lists no such reason)\n") == 4
    assert "skipped: got empty parameter set for (x)" in said


def test_a_missing_redis_server_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="redis-server is not on PATH"), redis_server(tmp_path):
        pass
