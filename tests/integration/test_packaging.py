"""The wheel holds the three packages and nothing else, and works where the checkout is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    packages = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("recsys", "jobs", "serve")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packages == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    extras = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}
    sorts = {"cpu", "gpu", "ray", "serve", "adapters", "classical", "decoder", "export", "redis", "report", "text"}
    assert extras == {*sorts, "tracking", "demo", "all", "dev"}
    assert "Classifier: Operating System :: POSIX :: Linux" in metadata
    assert "recsys/py.typed" in packages


# --- what one gets by which extras ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(wheel, tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def serving(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(wheel, tmp_path_factory.mktemp("serving"), "serve", "cpu")


def environment(wheel: Path, home: Path, *extras: str) -> Path:
    """The Python of an environment with the wheel and exactly what it declares, down to the last requirement.

    What it declares is linked from the environment that the tests run in, so nothing is downloaded.
    """
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (own,) = distributions(path=[str(site)])
    todo, done = list(wanted(own, extras)), set()
    while todo:
        name, asked = todo.pop()
        if (name, asked) not in done:
            done.add((name, asked))
            found = distribution(name)
            todo += wanted(found, asked)
            link(found, site)
    return home / "bin" / "python"


def wanted(found: Distribution, extras: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and extras of what ``found`` with ``extras`` requires here; extras of its own are followed."""
    for text in found.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            if canonicalize_name(requirement.name) == canonicalize_name(found.name):
                yield from wanted(found, sorted(requirement.extras))
            else:
                yield canonicalize_name(requirement.name), tuple(sorted(requirement.extras))


def link(found: Distribution, site: Path) -> None:
    """Every file of ``found`` in ``site``, but for scripts."""
    for file in found.files or ():
        if ".." not in file.parts and not (site / file).exists():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).symlink_to(Path(str(found.locate_file(file))))


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
packages, absent = (argument.split(",") for argument in sys.argv[1:])
there = [name for name in absent if importlib.util.find_spec(name) is not None]
found = {}
for package in map(importlib.import_module, packages):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith("recsys.testing") and module.name != "jobs.demo":
            found[module.name] = importlib.import_module(module.name).__file__
print(json.dumps([there, found]))
"""
USE = """
import sys
from pathlib import Path
from recsys import Recommender
from recsys.testing.tiny_bundle import make_bundle
bundle = make_bundle(Path(sys.argv[1]))
print(type(bundle.index()).__name__, bundle.manifest.library_versions["recsys"])
with Recommender.load(bundle.path) as recommender:
    print(len(recommender.recommend(user_id="u1", top_k=5).items))
"""


@pytest.mark.timeout(300)
def test_the_core_is_the_whole_library(core: Path, tmp_path: Path) -> None:
    """All of recsys and the commands that need no Ray can be imported, and models are trained, kept and asked."""
    absent = "faiss,ray,openvino,nncf,transformers,tokenizers,fastapi,starlette,orjson,httpx,matplotlib,sklearn,pytest"
    done = run(core, tmp_path, "-c", IMPORT_ALL, "recsys,jobs", absent)
    assert done.returncode == 0, done.stderr
    there, found = json.loads(done.stdout.splitlines()[-1])
    assert there == []
    assert len(found) > 100
    assert {name for name, file in found.items() if not file.startswith(str(core.parents[1]))} == set()
    done = run(core, tmp_path, "-c", USE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ExactIndex", version_of_project(), "5"]


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from recsys.index.ivf import IvfIndex as I; import numpy as np; I().build(np.ones((9, 2), 'f4'))", "cpu"),
        ("from recsys.models.text.encoder import read_encoder as r; r('/nowhere')", "text"),
        ("from jobs._ray import ray_session\nwith ray_session(): pass", "ray"),
        ("from recsys.evaluation.page import check_plots as c; c()", "report"),
    ],
)
def test_what_the_core_lacks_it_names(core: Path, tmp_path: Path, code: str, extra: str) -> None:
    done = run(core, tmp_path, "-c", code)
    assert "NotInstalledError: " in done.stderr and f"pip install 'recsys-ray[{extra}]'" in done.stderr, done.stderr


@pytest.mark.timeout(300)
def test_commands_of_the_core(core: Path, tmp_path: Path) -> None:
    for module in ("jobs.store", "jobs.pipeline"):
        done = run(core, tmp_path, "-m", module, "--help")
        assert done.returncode == 0, done.stderr
    (tmp_path / "tiny").mkdir()
    done = run(core, tmp_path, "-m", "serve.run", "--bundle", str(tmp_path / "tiny"), "--open")
    assert done.returncode == 2
    assert "pip install 'recsys-ray[serve]'" in done.stderr, done.stderr


@pytest.mark.timeout(300)
def test_serve_and_cpu_are_enough_to_serve(serving: Path, tmp_path: Path) -> None:
    done = run(
        serving, tmp_path, "-c", IMPORT_ALL, "recsys,jobs,serve", "openvino,nncf,transformers,matplotlib,mlflow,redis"
    )
    assert done.returncode == 0, done.stderr
    there, found = json.loads(done.stdout.splitlines()[-1])
    assert there == []
    assert any(name.startswith("serve.http") for name in found)
    done = run(serving, tmp_path, "-c", USE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VectorIndex", version_of_project(), "5"]


def version_of_project() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
