"""What every test runs under: its own Ray settings, one thread per process, Ray in integration tests only."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

SESSION = secrets.token_hex(16)
RAY_FOLDER = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # short: a socket's path may have 107 bytes

# Set before anything imports Ray or torch, and inherited by every process that a test starts.
os.environ.update(
    {
        "RECSYS_TEST_SESSION": SESSION,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": RAY_FOLDER,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
os.environ.pop("RAY_ADDRESS", None)

settings.register_profile("house", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("house")


# --- markers ----------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (ROOT / "tests" / "integration") in item.path.parents:
            item.add_marker(pytest.mark.integration)


# --- skipped tests ----------------------------------------------------------------------------------------------------

# Every reason for which a test may be skipped; a test that is skipped for another fails. A missing package or program
# is no reason: `make test` installs what the tests need.
MAY_SKIP = {
    # the machine's
    "the data sets of ../shared/data are not on this machine",
    "this machine has a GPU that FAISS can use",
    # a kind's: the contract asks for what it does not have
    "this kind reads no files",
    "this kind has no vectors",
    "this kind does not learn in steps",
    "this kind reads no texts",
    "fitted without text vectors here",
    "knows items by what they say, and here they say nothing",
    "there is nothing to send that does not fit",
}
if platform.machine() != "x86_64":  # as in pyproject.toml
    MAY_SKIP.add("openvino is not installed on this platform")


def _judged(report: Any) -> Any:
    """``report``, which becomes a failure where it says "skipped" for a reason that is not in ``MAY_SKIP``."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in MAY_SKIP:
            report.outcome = "failed"
            report.longrepr = f"skipped: {reason} (MAY_SKIP in tests/conftest.py lists no such reason)"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _judged((yield))


# --- Ray: forbidden outside the integration tests ---------------------------------------------------------------------


class _RayGuard(importlib.abc.MetaPathFinder):
    """Puts a check before ``ray.init`` when Ray is imported, so that tests which never import it do not pay for it."""

    forbidden = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != "ray":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.watch(module)

            spec.loader.exec_module = exec_module
        return spec

    def watch(self, ray: ModuleType) -> None:
        start = ray.init

        def init(*args: Any, **kwargs: Any) -> Any:
            if self.forbidden:
                raise RuntimeError("this test must run without Ray: move it to tests/integration")
            return start(*args, **kwargs)

        ray.init = init


_guard = _RayGuard()
sys.meta_path.insert(0, _guard)
if "ray" in sys.modules:
    _guard.watch(sys.modules["ray"])


@pytest.fixture(autouse=True)
def _ray_only_in_integration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_guard, "forbidden", "integration" not in request.keywords)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Any]:
    """A real Ray on this machine with two CPUs; shut down, with what Serve runs on it, at the end of the session."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=512 * 1024**2,
        log_to_driver=True,
    )
    yield context
    if ray.is_initialized():
        from ray import serve

        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def travels_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray's workers cannot import a test file: what it defines travels to them by value."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(request.module)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data sets of ../shared/data are not on this machine")
    return folder


# --- nothing is left behind -------------------------------------------------------------------------------------------


def _own_processes() -> list[int]:
    """Ids of the live processes that this session started, directly or not."""
    mark = f"RECSYS_TEST_SESSION={SESSION}".encode()
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            if pid == os.getpid() or mark not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            # Python's own resource tracker ends with this process, not before it.
            if b"multiprocessing.resource_tracker" not in (folder / "cmdline").read_bytes():
                found.append(pid)
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    deadline = time.monotonic() + 15
    while (left := _own_processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        name = Path(f"/proc/{pid}/cmdline")
        text = name.read_bytes().replace(b"\0", b" ").decode(errors="replace") if name.exists() else "(ended)"
        sys.stderr.write(f"\nleft behind by the tests, ended now: {pid} {text[:200]}\n")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    shutil.rmtree(RAY_FOLDER, ignore_errors=True)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
