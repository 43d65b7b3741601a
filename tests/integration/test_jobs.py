"""The jobs as a person runs them: on this machine, and submitted to a cluster. Both give the same kind of Bundle."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from recsys.bundle import Bundle
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.pipeline.bundle_config import BundleConfig
from recsys.pipeline.recommender import Recommender
from recsys.pipeline.requests import RecommendRequest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/synthetic.yaml"
QUICK = ["data.source.num_users=120", "data.source.num_items=80", "retriever.train.epochs=1", "ranking.model.epochs=1"]
QUICK += ["ranking.export.enabled=false"]  # which form is the fastest is not the same on every day


def overrides(*pairs: str) -> list[str]:
    return [part for pair in (*QUICK, *pairs) for part in ("--set", pair)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The pipeline in one process, without Ray."""
    workdir = tmp_path_factory.mktemp("local")
    return workdir, pipeline(workdir)


def pipeline(workdir: Path, step: str = "pipeline", *more: str) -> str:
    command = [sys.executable, "-m", f"jobs.{step}", "--config", CONFIG]
    command += overrides(f"workdir={workdir}", "compute.num_workers=0", *more)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_bundle_recommends_without_ray(local: tuple[Path, str]) -> None:
    workdir, _ = local
    store = workdir / "synthetic" / "bundles"
    user_id = Bundle.open(store).histories()["user_id"][0].as_py()
    with Recommender.load(store) as recommender:
        known = recommender.recommend(user_id=user_id, top_k=5)
        stranger = recommender.recommend(top_k=5)
    assert len(known.items) == len(stranger.items) == 5
    assert not known.degraded
    assert set(known.items[0].stage_scores) >= {"retrieval", "ranking"}


def test_the_same_models_are_the_same_bundle(local: tuple[Path, str], tmp_path: Path) -> None:
    """Wherever they were made, under whatever name, and however busy the machine was."""
    workdir, _ = local
    pipeline(tmp_path, "pipeline", "name=another", "publish.keep=7")
    first, second = (
        Bundle.open(each) for each in (workdir / "synthetic" / "bundles", tmp_path / "another" / "bundles")
    )
    assert {name: each.sha256 for name, each in first.manifest.files.items()} == {
        name: each.sha256 for name, each in second.manifest.files.items()
    }
    assert first.bundle_id == second.bundle_id
    assert set(first.config) == set(BundleConfig.model_fields)
    # Models are on the disk once, and every folder but the store may go.
    (trained,) = tmp_path.glob("retriever/*/final")
    for file in (each for each in trained.rglob("*") if each.is_file()):
        assert file.samefile(second.part("retriever") / file.relative_to(trained))
    for step in set(tmp_path.iterdir()) - {tmp_path / "another"}:
        shutil.rmtree(step)
    Bundle.open(tmp_path / "another" / "bundles").check()


def test_every_user_has_a_slate_that_was_made_offline(local: tuple[Path, str]) -> None:
    workdir, _ = local
    store = workdir / "synthetic" / "bundles"
    bundle = Bundle.open(store)
    (path,) = workdir.glob("recommend/*/slates.parquet")
    table = pq.read_table(path)
    histories = bundle.histories()
    assert table["user_id"].to_pylist() == histories["user_id"].to_pylist()
    for items, seen in zip(table["item_ids"].to_pylist(), histories["item_ids"].to_pylist(), strict=True):
        assert len(set(items)) == 20
        assert not set(items) & set(seen)
    slates = bundle.slates()
    user_id, items = table["user_id"][3].as_py(), table["item_ids"][3].as_py()
    assert bundle.catalogue().id_map.take(slates.of(user_id).item_idx) == items
    # It is what a server answers at the end of the data.
    now_ms = max(time for times in histories["timestamps_ms"].to_pylist() for time in times) + 60_000
    with Recommender.load(store, inline=True) as recommender:
        request = RecommendRequest(user_id=user_id, top_k=20, deadline_ms=10_000)
        assert asyncio.run(recommender.arecommend(request, now_ms=now_ms)).item_ids == items


def test_a_second_run_reuses_every_step(local: tuple[Path, str]) -> None:
    workdir, first = local
    assert "reused" not in first
    assert pipeline(workdir).count("reused  ") == 6


def test_a_changed_setting_runs_again_from_its_step_on(local: tuple[Path, str]) -> None:
    workdir, _ = local
    said = pipeline(workdir, "train_ranker", "model.epochs=2")  # below the step's own section
    assert "prepare reused" in said and "train_retriever reused" in said and "train_ranker done" in said


def test_the_report_has_the_pipeline_and_its_baselines(local: tuple[Path, str]) -> None:
    workdir, _ = local
    (report,) = workdir.glob("evaluate/*/metrics.json")
    names = {system["name"] for system in json.loads(report.read_text())["systems"]}
    assert {"served", "retrieval", "popularity", "item_knn", "popularity window_days=30.0"} <= names


@pytest.mark.timeout(420)
def test_several_sources_and_a_ranker_of_words_on_two_workers(tmp_path: Path) -> None:
    """What workers share must be reached by every loss, and every source and the ranker must travel in the Bundle."""
    encoder = tiny_encoder(tmp_path / "bert", ["item", "the", "of"], dim=16)
    sequence = {"kind": "esasrec", "dim": 16, "num_blocks": 1, "train": {"epochs": 1}}
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    config["retriever"] = {
        "kind": "blend",
        "sources": {"sequence": {"retriever": sequence}, "together": {"retriever": {"kind": "item_knn"}}},
    }
    config["ranking"]["model"] = {"kind": "cross_encoder", "model": str(encoder), "epochs": 1, "max_history": 2}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "jobs.pipeline", "--config", str(tmp_path / "own.yaml")]
    for pair in (*QUICK[:2], f"workdir={tmp_path / 'runs'}", "compute.num_workers=2"):
        command += ["--set", pair]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    with Recommender.load(tmp_path / "runs" / config["name"] / "bundles") as recommender:
        slate = recommender.recommend(history=["item-1", "item-2"], top_k=10)
    assert len(slate.items) == 10
    assert not slate.degraded
    assert {source for item in slate.items for source in item.sources} == {"sequence", "together"}
    assert all("ranking" in item.stage_scores for item in slate.items)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("retriever.kind=oracle", ["retriever", "oracle", "esasrec"]),
        ("retriever.dimension=3", ["retriever", "dimension"]),
        ("data.source.num_users=many", ["data.source", "num_users"]),
        ("data", ["key.sub=value"]),
    ],
)
def test_a_wrong_setting_is_named(override: str, words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.prepare", "--config", CONFIG, "--set", override]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_help_explains_every_key_of_a_step() -> None:
    command = [sys.executable, "-m", "jobs.train_retriever", "--config", CONFIG, "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    for words in ("--config", "--set", "\ndim: ", "\n  epochs: ", "  # "):
        assert words in said


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray cluster of one node that jobs are submitted to; yields its address and the environment to reach it."""
    port, dashboard = free_port(), free_port()
    mark = f"RECSYS_TEST_CLUSTER={uuid.uuid4().hex}"
    environment = {
        **os.environ,
        **dict([mark.split("=")]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp"),
    }
    command = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, environment["RAY_AUTH_TOKEN"], head, tmp_path / "ray.log")
        yield address, environment
    finally:
        # `ray start --block` takes minutes to leave when asked; nothing of this cluster is worth waiting for.
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # it ended meanwhile
                continue
        head.wait()


def wait_for(address: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the cluster did not come up:\n{log.read_text()[-4000:]}")


def free_port() -> int:
    # Below 10000 or above 19999: Ray's workers listen between.
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


@pytest.mark.timeout(420)
def test_a_submitted_job_gives_the_same_kind_of_bundle(
    local: tuple[Path, str], cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = cluster
    command = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
    command += ["python", "-m", "jobs.pipeline", "--config", CONFIG, *overrides(f"workdir={tmp_path / 'runs'}")]
    deadline = time.monotonic() + 60
    while True:  # the agent that starts jobs comes up a moment after the dashboard answers
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    submitted = Bundle.open(tmp_path / "runs" / "synthetic" / "bundles")
    in_process = Bundle.open(local[0] / "synthetic" / "bundles")
    assert submitted.manifest.files.keys() == in_process.manifest.files.keys()
    assert submitted.manifest.dataset_fingerprint == in_process.manifest.dataset_fingerprint
    assert submitted.manifest.id_map_fingerprint == in_process.manifest.id_map_fingerprint
    with Recommender.load(submitted.path) as recommender:
        recommender.answer_golden(submitted.golden)
