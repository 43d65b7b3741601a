"""Fine-tuning and embedding on a real Ray: data-parallel, through killed workers, with the answer of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs._ray import ComputeConfig, fit_distributed
from jobs.artifacts import Embedded, Prepared, TrainedEncoder
from jobs.steps import embed, train_encoder
from recsys import schema
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.histories import Histories
from recsys.files import write_json
from recsys.models.text.contrastive import PairData, consecutive_pairs, finetune
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, TextTrainConfig
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.training.runtime import Runtime

WORDS = ["red", "green", "blue", "car", "bike", "boat"]
NUM_ITEMS = 3000
COMPUTE = ComputeConfig(num_workers=2, cpus_per_worker=0.5, threads_per_worker=1, max_failures=2)


pytestmark = pytest.mark.usefixtures("travels_by_value")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("bert"), WORDS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """A prepared dataset as the step before leaves it."""
    path = tmp_path_factory.mktemp("prepare")
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(NUM_ITEMS)]
    items = [{"item_id": str(i), "title": t, "categories": [], "available": True} for i, t in enumerate(titles)]
    log = [
        {"user_idx": user, "item_idx": int(item), "position": place, "event": "view", "weight": 1.0, "split": 0}
        for user in range(20)
        for place, item in enumerate(rng.choice(40, 8, replace=False))
    ]
    info = DatasetInfo(
        name="toy",
        fingerprint="",
        id_map_fingerprint="",
        has_time=False,
        protocol="leave_one_out",
        num_users=20,
        num_items=NUM_ITEMS,
        num_interactions=len(log),
        num_positives=len(log),
        num_quarantined=0,
        counts_by_split={Split.TRAIN.name: len(log)},
    )
    tables = (pa.Table.from_pylist(log, schema=schema.PREPARED_INTERACTIONS), pa.Table.from_pylist(items, schema.ITEMS))
    Dataset(*tables, users=pa.table({"user_id": [str(u) for u in range(20)]}), info=info).save(path)
    return Prepared("prepare", "toy", path)


def job_config(workdir: Path, folder: Path, num_workers: int, **train: float) -> SimpleNamespace:
    encoder = TextEncoderConfig(model=str(folder), backend="torch", train=TextTrainConfig(batch_size=16, **train))
    compute = COMPUTE.model_copy(update={"num_workers": num_workers})
    return SimpleNamespace(workdir=workdir, seed=0, encoder=encoder, compute=compute)


def die_once(payload: tuple[TextEncoderConfig, PairData, Path], runtime: Runtime) -> Callable[[Path], None]:
    """Fine-tune, but the last worker is killed after epoch 2 of the first attempt."""
    config, data, flag = payload
    restored = runtime.restore()
    if runtime.rank == 0:
        with (flag / "attempts").open("a") as file:
            file.write(f"{restored is not None}\n")
    report = runtime.report

    def report_and_die(metrics, save=None):
        report(metrics, save)
        if metrics["epoch"] == 3 and runtime.rank == runtime.world_size - 1 and not (flag / "died").exists():
            (flag / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    runtime.report = report_and_die
    tuned = finetune(config, data, runtime)
    encoder, curve = tuned.encoder, tuned.curve

    def save(target: Path) -> None:
        encoder.save(target)
        write_json(target / "world.json", {"size": runtime.world_size, "epochs": len(curve)})

    return save


@pytest.mark.timeout(600)
def test_a_killed_worker_does_not_end_the_training(local_ray, folder, tmp_path):
    from recsys.files import read_json

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(40)]
    pairs = consecutive_pairs(Histories.from_lists([rng.permutation(40)[:6].tolist() for _ in range(12)]), 1)
    train = TextTrainConfig(epochs=4, batch_size=16, learning_rate=1e-3)
    config = TextEncoderConfig(model=str(folder), backend="torch", train=train)
    data = PairData(texts, pairs)
    fit = fit_distributed(die_once, (config, data, tmp_path), compute=COMPUTE, name="killed", storage=tmp_path / "a")
    assert (tmp_path / "died").exists()
    assert (tmp_path / "attempts").read_text().split() == ["False", "True"]
    assert read_json(fit.path / "world.json") == {"size": 2, "epochs": 4}
    assert fit.metrics["epoch"] == 4

    # The very same training without a death: the flag is set already.
    whole = fit_distributed(die_once, (config, data, tmp_path), compute=COMPUTE, name="whole", storage=tmp_path / "b")
    one, other = (TextEncoder.load(config, result.path).encode(texts) for result in (fit, whole))
    np.testing.assert_allclose(one, other, atol=1e-5)

    # A finished training is found, not run again.
    again = fit_distributed(die_once, (config, data, tmp_path), compute=COMPUTE, name="killed", storage=tmp_path / "a")
    assert again == fit
    assert len((tmp_path / "attempts").read_text().split()) == 3


@pytest.mark.timeout(600)
def test_jobs_on_ray_give_what_one_process_gives(local_ray, folder, prepared, tmp_path):
    config = job_config(tmp_path, folder, num_workers=2, epochs=1)
    encoder = train_encoder.run(config, prepared)
    assert encoder.metrics["num_pairs"] > 10
    assert (encoder.folder / "model.safetensors").exists()

    embedded = embed.run(config, prepared, encoder)
    vectors = pq.read_table(embedded.path / "item_text.parquet")
    assert vectors["item_idx"].to_pylist() == list(range(NUM_ITEMS))
    assert vectors.schema.field("item_idx").type == pa.int32()
    assert vectors.schema.field("vector").type == pa.list_(pa.float32(), 16)

    alone = job_config(tmp_path / "alone", folder, num_workers=0, epochs=1)
    expected = embed.run(alone, prepared, encoder).vectors()
    np.testing.assert_allclose(embedded.vectors(), expected, atol=1e-5)
    assert embed.run(config, prepared, encoder).reused


class Fragile(embed.Embedder):
    """Dies at the third part while the file ``deadly`` is there, once or always; notes the parts it was given."""

    def make(self, part: str) -> int:
        home, name = self._target.parents[2], Path(part).name
        with (home / "calls").open("a") as file:
            file.write(name + "\n")
        if name == "part-000002.parquet" and (home / "deadly").exists():
            if (home / "deadly").read_text() == "always":
                raise RuntimeError("made to fail")
            (home / "deadly").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(part)


def check_vectors(result: Embedded, prepared: Prepared, config: SimpleNamespace, encoder: TrainedEncoder) -> None:
    titles = prepared.dataset().items["title"].to_pylist()
    expected = TextEncoder.load(config.encoder, encoder.folder).encode(titles)
    np.testing.assert_allclose(result.vectors(), expected, atol=1e-5)


@pytest.mark.timeout(600)
def test_embedding_survives_a_killed_actor(local_ray, folder, prepared, tmp_path, monkeypatch):
    config = job_config(tmp_path, folder, num_workers=1)
    encoder = train_encoder.run(config, prepared)
    (tmp_path / "deadly").write_text("once")
    monkeypatch.setattr(embed, "PART_ROWS", 500)
    monkeypatch.setattr(embed, "Embedder", Fragile)
    check_vectors(embed.run(config, prepared, encoder), prepared, config, encoder)
    assert not (tmp_path / "deadly").exists()


@pytest.mark.timeout(600)
def test_an_interrupted_embedding_goes_on_with_what_is_missing(local_ray, folder, prepared, tmp_path, monkeypatch):
    config = job_config(tmp_path, folder, num_workers=1)
    encoder = train_encoder.run(config, prepared)
    (tmp_path / "deadly").write_text("always")
    monkeypatch.setattr(embed, "PART_ROWS", 500)
    monkeypatch.setattr(embed, "Embedder", Fragile)
    with pytest.raises(Exception, match="made to fail"):
        embed.run(config, prepared, encoder)
    assert not any(tmp_path.rglob("item_text.parquet"))
    written = {path.name for path in tmp_path.rglob("vectors/*.parquet")}
    (tmp_path / "deadly").unlink()
    (tmp_path / "calls").write_text("")
    result = embed.run(config, prepared, encoder)
    again = (tmp_path / "calls").read_text().split()
    assert sorted(again) == sorted({f"part-{part:06d}.parquet" for part in range(6)} - written)
    assert "part-000002.parquet" in again
    check_vectors(result, prepared, config, encoder)
