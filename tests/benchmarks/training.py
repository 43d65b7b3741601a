"""Training speed beside RecTools SASRec, written to ``results/quality.json``: ``make bench-training``.

Both train in turn, an epoch each, in one run on the same cores (``--only`` picks figures). RecTools runs in an
environment of its own, ``.venv-peers``. Run it on a quiet machine: it times things.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from rows import write_row

from jobs.benchmark import SUITES, BenchmarkConfig
from jobs.external import export
from recsys.config import load_config
from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split
from recsys.data.histories import Histories
from recsys.data.prepare import prepare
from recsys.files import read_json, write_json
from recsys.models.base import FitData
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.training.runtime import Runtime

COMMAND = "make bench-training"
PEER = [".venv-peers/bin/python", "tests/benchmarks/peers/rectools_peer.py", "sasrec"]
FILE = "quality"
THREADS = 2
BATCH = 128
LENGTH = {"beauty": 50, "ml1m": 200}
SHARE = {"beauty": 0.25, "ml1m": 0.1}
"""of the users, for the two speed ratios: an epoch of RecTools on all of them takes minutes"""
EPOCHS = 4
"""timed epochs of each side, after one that is not"""
TIMED_EPOCHS = 6
"""of RecTools, in turn with as much time of ours: later epochs are only counted"""
SPEED_BAR = {"beauty": 12.0, "ml1m": 5.0}
TIME_BAR = {"beauty": 0.15, "ml1m": 0.3}


class Peer:
    """RecTools SASRec, epoch by epoch."""

    def __init__(self, folder: Path, suite: str, *, epochs: int, patience: int, checkpoint: Path | None = None) -> None:
        words = [*PEER, "--lockstep", "--factors", "64", "--blocks", "2", "--heads", "2"]
        words += ["--length", str(LENGTH[suite]), "--batch", str(BATCH), "--threads", str(THREADS)]
        words += ["--epochs", str(epochs), "--patience", str(patience)]
        words += [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        words.append(str(folder))
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def epoch(self) -> dict[str, Any]:
        """Train one more epoch: ``seconds``, ``cpu_seconds``, ``validation_seconds``, ``ndcg@10``, ``stopped``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"RecTools ended with {self._process.wait()}")

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


class Ours(Runtime):
    """Our training in a thread of this process, epoch by epoch; the seconds include validation where there is any."""

    def __init__(self, model: ESASRec, data: FitData) -> None:
        super().__init__("cpu")
        self._go, self._rows = threading.Semaphore(0), queue.Queue[dict[str, float] | Exception]()

        def train() -> None:
            self._go.acquire()
            self._begin()
            try:
                model.fit(data, self)
            except Exception as error:  # noqa: BLE001 raised where the next epoch is asked for
                self._rows.put(error)

        self._thread = threading.Thread(target=train, daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        """The end of an epoch: hand over the row, wait for the next turn."""
        spent = {"seconds": time.perf_counter() - self._started, "cpu_seconds": time.process_time() - self._cpu}
        self._rows.put({**metrics, **spent})
        self._go.acquire()
        self._begin()

    def epoch(self) -> dict[str, float]:
        """Train one more epoch."""
        self._go.release()
        row = self._rows.get(timeout=3600)
        if isinstance(row, Exception):
            raise row
        return row


def few_users(dataset: Dataset, share: float, folder: Path) -> Histories:
    """The training histories of a seeded sample of users; writes them for the peer too."""
    histories = dataset.positives.histories(Split.TRAIN)
    users = np.flatnonzero(histories.lengths > 1)
    chosen = np.sort(np.random.default_rng(0).choice(users, round(len(users) * share), replace=False))
    for name in ("train", "valid", "test"):
        table = pq.read_table(folder / f"{name}.parquet")
        if name == "train":
            pq.write_table(table.filter(np.isin(table["user_idx"].to_numpy(), chosen)), folder / f"{name}.parquet")
        else:
            pq.write_table(table.slice(0, 200), folder / f"{name}.parquet")
    return histories[chosen]


def flops_per_epoch(histories: Histories, num_items: int, model: ESASRec) -> float:
    """Useful floating-point operations of an epoch: two per multiply-add, times three for forward and backward.

    Per token: the matrices of the blocks, ``8 d^2`` of attention and its two gates' ``2 d^2`` with ``3 d h`` of the
    feed-forward; the head, ``d N``; and causal attention, ``2 d (p + 1)`` at position ``p``. Nothing else is counted.
    """
    lengths = histories.lengths
    d, h = model.dim, model.hidden_dim
    whole, rest = lengths // model.max_length, lengths % model.max_length
    length = model.max_length
    attended = (whole * (length * (length + 1) // 2) + rest * (rest + 1) // 2).sum()  # of windows cut at the front
    blocks = model.num_blocks * (4 * d * d + 2 * d * d + 3 * d * h)
    return 6.0 * (lengths.sum() * (blocks + d * num_items) + model.num_blocks * 2 * d * attended)


def matmul_rate(size: int = 2048, repeats: int = 6) -> float:
    """FLOP/s of a ``size``-cubed fp32 matrix product, the median of ``repeats``."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / float(np.median(seconds))


def load(suite: str, workdir: Path) -> tuple[BenchmarkConfig, Dataset]:
    """The suite and its data."""
    config = load_config(BenchmarkConfig, SUITES / f"{suite}.yaml")
    return config, prepare(config.data, 0, workdir / suite)


def same_shape(suite: str, tokens_per_sequence: float) -> ESASRec:
    """Ours with the peer's factors, blocks, length, full softmax and sequences per step."""
    train = {"epochs": EPOCHS + 1, "batch_tokens": round(BATCH * tokens_per_sequence)}
    shape = {"dim": 64, "num_blocks": 2, "num_heads": 2, "hidden_dim": 128, "max_length": LENGTH[suite]}
    return ESASRec.parse({**shape, "num_negatives": 0, "train": train}, where="benchmark")


def speed(suite: str, workdir: Path) -> None:
    """``train_speed_ratio_*``: tokens per second, epoch and epoch about; with ``ml1m`` the share of FLOP/s too."""
    config, dataset = load(suite, workdir)
    with tempfile.TemporaryDirectory() as scratch:
        export(dataset, config.evaluation, 0, Path(scratch))
        histories = few_users(dataset, SHARE[suite], Path(scratch))
        model = same_shape(suite, float(np.minimum(histories.lengths, LENGTH[suite]).mean()))
        data = replace(FitData.of(dataset, Split.TRAIN), histories=histories)
        theirs = Peer(Path(scratch), suite, epochs=EPOCHS + 1, patience=EPOCHS + 1)
        ours = Ours(model, data)
        theirs.epoch(), ours.epoch()  # warm
        seconds: dict[str, list[float]] = {"ours": [], "rectools": [], "ours_cpu": [], "rectools_cpu": []}
        peak: list[float] = []
        for _ in range(EPOCHS):
            row, other = ours.epoch(), theirs.epoch()
            seconds["ours"].append(row["seconds"])
            seconds["ours_cpu"].append(row["cpu_seconds"])
            seconds["rectools"].append(other["seconds"])
            seconds["rectools_cpu"].append(other["cpu_seconds"])
            peak.append(matmul_rate())
            print(f"{suite}: ours {row['seconds']:.2f} s, RecTools {other['seconds']:.2f} s", flush=True)
        theirs.close()
    tokens = {
        "ours": int(histories.lengths.sum()),
        "rectools": int(np.minimum(histories.lengths - 1, LENGTH[suite]).sum()),
    }
    rates = {name: [number / each for each in seconds[name]] for name, number in tokens.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["rectools"], strict=True)]
    ratio = float(np.median(ratios))
    shape = (
        f"64 factors, 2 blocks, length {LENGTH[suite]}, full softmax, batch {BATCH} sequences, fp32, {THREADS} threads"
    )
    details = {
        "tokens_per_s": {name: float(np.median(rate)) for name, rate in rates.items()},
        "ratios": ratios,
        "tokens_per_cpu_s": {
            name: number / float(np.median(seconds[f"{name}_cpu"])) for name, number in tokens.items()
        },
        "num_users": len(histories),
        "torch": torch.__version__,
    }
    write_row(
        FILE,
        f"train_speed_ratio_{suite}",
        ratio,
        unit="x",
        bar=f">= {SPEED_BAR[suite]:g}",
        passes=ratio >= SPEED_BAR[suite],
        protocol=f"real tokens per second over those of RecTools 0.19 SASRec, median of {EPOCHS} epochs each in turn "
        f"after one to warm up; {suite}, a seeded {SHARE[suite]:.0%} of the users; {shape}; set-up and validation "
        "excluded",
        command=COMMAND,
        seeds=[0],
        details=details,
    )
    if suite == "ml1m":
        useful = flops_per_epoch(histories, dataset.num_items, model)
        shares = [useful / each / rate for each, rate in zip(seconds["ours"], peak, strict=True)]
        share = float(np.median(shares))
        write_row(
            FILE,
            "train_flops_share",
            share,
            unit="",
            bar=">= 0.35",
            passes=share >= 0.35,
            protocol="useful FLOP/s of training over those of a 2048^3 fp32 matrix product, in turn with it; useful: 6 "
            "per token and weight of the blocks' matrices and of all item vectors, 12 d (p + 1) per block for "
            f"attention at position p; {suite}; {shape}",
            command=COMMAND,
            seeds=[0],
            details={"gflops": useful / float(np.median(seconds["ours"])) / 1e9, "matmul_gflops": np.median(peak) / 1e9,
                     "shares": shares},
        )  # fmt: skip


class Kept:
    """What an interrupted measurement goes on from: both curves so far, and RecTools after its last epoch."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        """What ``folder`` has of this data, measured with this code; else nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder.absolute() / "rectools.ckpt"
        """where RecTools leaves its state, and begins from"""
        self.curves: dict[str, list[dict[str, Any]]] = {"ours": [], "rectools": []}
        self._file = folder / "so_far.json"
        code = [Path(__file__), Path(PEER[1]), *sorted(Path("recsys").rglob("*.py"))]
        read = [path.read_bytes() for path in code] + [dataset.info.fingerprint.encode()]
        self._of = sha256(b"".join(read)).hexdigest()
        self.checkpoint.unlink(missing_ok=True)
        if self._file.exists() and (found := read_json(self._file))["of"] == self._of:
            self.curves = found["curves"]
            shutil.copy(folder / found["checkpoint"], self.checkpoint)
            print(f"goes on after epoch {len(self.curves['rectools'])} of RecTools", flush=True)

    def keep(self) -> None:
        """While RecTools waits: its state and the curves, as one."""
        epoch = self.checkpoint.with_name(f"epoch-{len(self.curves['rectools'])}.ckpt")
        shutil.copy(self.checkpoint, epoch)
        write_json(self._file, {"of": self._of, "checkpoint": epoch.name, "curves": self.curves})
        for old in epoch.parent.glob("epoch-*.ckpt"):
            if old != epoch:
                old.unlink()

    def forget(self) -> None:
        """All of it has come to its end."""
        shutil.rmtree(self.checkpoint.parent)


def time_to_quality(suite: str, workdir: Path, max_epochs: int) -> None:
    """``time_to_quality_*``: until the validation NDCG@10 that RecTools has at its best when it stops early.

    If RecTools has not stopped after ``max_epochs``, the row is ``time_to_quality_*_at_most``: the time until ours is
    at its own best, over that until RecTools was at its best so far. Unless RecTools ends above ours, it needs no less.

    Both train in turn until RecTools has had ``TIMED_EPOCHS``: on a quiet machine, that tells the seconds of their
    epochs. From there on RecTools trains alone, which takes hours and only tells after how many epochs it is at its
    best, and ours goes on where RecTools has come past it: other work may run beside that, and interrupted it goes on
    after the last epoch of RecTools.
    """
    config, dataset = load(suite, workdir)
    system = config.system("esasrec")
    assert isinstance(system.model, ESASRec)
    train = system.model.train.model_copy(update={"eval_max_queries": 1 << 30, "patience": 1000})
    model = system.model.model_copy(update={"train": train})
    data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID))
    kept = Kept(workdir / f"time-{suite}", dataset)
    curves = kept.curves
    with tempfile.TemporaryDirectory() as scratch:
        export(dataset, config.evaluation, 0, Path(scratch))
        theirs = Peer(Path(scratch), suite, epochs=max_epochs, patience=5, checkpoint=kept.checkpoint)
        ours = Ours(model, data)
        stopped, trained = False, 0
        while not stopped:
            in_turn = len(curves["rectools"]) < TIMED_EPOCHS
            row = theirs.epoch()
            stopped = row["stopped"]
            seconds = row["seconds"] + row["validation_seconds"]
            curves["rectools"].append({"seconds": seconds, "ndcg@10": row["ndcg@10"], "in_turn": in_turn})
            # As much time for ours as theirs has had, so that both see the machine at the same moments.
            while trained < train.epochs and (
                _best(curves["ours"]) < _best(curves["rectools"])
                or (in_turn and _spent(curves["ours"]) < _spent(curves["rectools"]))
            ):
                mine = ours.epoch()
                trained += 1
                if trained > len(curves["ours"]):  # else one that was kept: it is deterministic
                    curves["ours"].append({"seconds": mine["seconds"], "ndcg@10": mine["ndcg@10"], "in_turn": in_turn})
            assert len(curves["rectools"]) <= max_epochs, "it was trained for longer already"
            best = {name: _best(curve) for name, curve in curves.items()}
            print(f"{suite}: {[len(curve) for curve in curves.values()]} epochs, best {best}", flush=True)
            if len(curves["rectools"]) >= TIMED_EPOCHS:
                kept.keep()
        theirs.close()
    quality = _best(curves["rectools"])
    epochs = {
        name: next((number + 1 for number, row in enumerate(curve) if row["ndcg@10"] >= quality), None)
        for name, curve in curves.items()
    }
    per_epoch = {
        name: float(np.median([row["seconds"] for row in curve if row["in_turn"]])) for name, curve in curves.items()
    }
    assert epochs["rectools"] is not None
    cut = epochs["rectools"] > max_epochs - 5  # it had no five epochs without a better one
    ours_best = _best(curves["ours"])
    if cut:
        last = next(number for number, row in enumerate(curves["ours"], 1) if row["ndcg@10"] == ours_best)
        reached, spent = last * per_epoch["ours"], epochs["rectools"] * per_epoch["rectools"]
        what = (
            f"of ours ({ours_best:.4f}), over those until RecTools 0.19 SASRec, cut after {max_epochs} epochs, was at "
            f"{quality:.4f}: it needs no less until its best one, unless that is above ours"
        )
    else:
        reached = float("inf") if epochs["ours"] is None else epochs["ours"] * per_epoch["ours"]
        spent = epochs["rectools"] * per_epoch["rectools"]
        what = f"({quality:.4f}) of RecTools 0.19 SASRec, over the same of RecTools"
    ratio = reached / spent
    write_row(
        FILE,
        f"time_to_quality_{suite}" + ("_at_most" if cut else ""),
        ratio,
        unit="x",
        bar=f"<= {TIME_BAR[suite]:g}",
        passes=ratio <= TIME_BAR[suite] and quality <= ours_best,
        protocol=f"epochs, times the median seconds of training and validation of one, until the best validation "
        f"NDCG@10 {what} (64 factors, 2 blocks, length {LENGTH[suite]}, full softmax, batch {BATCH}, learning rate "
        f"1e-3, stopped after 5 epochs without a better one); {suite}, all users; ours as in the suite; fp32, "
        f"{THREADS} threads; epochs are timed in turn until RecTools has had {TIMED_EPOCHS}, and only counted from "
        "there on",
        command=COMMAND + (f", with --only time_{suite} --max-epochs {max_epochs}" if cut else ""),
        seeds=[0],
        details={"epochs": epochs, "epoch_seconds": per_epoch, "quality": quality, "curves": curves},
    )
    kept.forget()


def _spent(curve: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["seconds"] for row in curve)


def _best(curve: Sequence[Mapping[str, Any]]) -> float:
    return max((row["ndcg@10"] for row in curve), default=0.0)


def million_items(workdir: Path) -> None:
    """``train_1m_items_peak_bytes``: a catalogue of a million items, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, before, seconds, tokens = pool.apply(_train_million, (str(workdir / "million"),))
    held = 1_000_000 * 64 * 4
    write_row(
        FILE,
        "train_1m_items_peak_bytes",
        peak,
        unit="bytes",
        bar="<= 3e9",
        passes=peak <= 3e9,
        protocol="largest resident size of the process that trains an epoch over 1,000,000 synthetic items, 64 dims, "
        f"sampled softmax with 4096 negatives, 4096 tokens per step, fp32; {before / 1e9:.2f}e9 before training; item "
        f"vectors alone are {held / 1e9:.2f}e9, held as weights, gradients, two moments of AdamW and a running average",
        command=COMMAND,
        seeds=[0],
        details={"tokens": tokens, "seconds": seconds},
    )


def _train_million(folder: str) -> tuple[int, int, float, int]:
    torch.set_num_threads(THREADS)
    source = {"kind": "synthetic", "num_users": 20_000, "num_items": 1_000_000, "num_clusters": 1000, "mean_length": 20}
    dataset = prepare(DataConfig.parse({"source": source}, where="benchmark"), 0, folder)
    data = FitData.of(dataset, Split.TRAIN)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = ESASRec.parse({"num_negatives": 4096, "train": {"epochs": 1, "batch_tokens": 4096}}, where="benchmark")
    started = time.perf_counter()
    model.fit(data, Runtime("cpu"))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, before, seconds, int(data.histories.lengths.sum())


FIGURES = [*(f"speed_{suite}" for suite in LENGTH), "million", *(f"time_{suite}" for suite in LENGTH)]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(FIGURES)}")] = None,
    workdir: Annotated[Path, typer.Option(help="folder of the prepared data")] = Path("runs/benchmark/training"),
    max_epochs: Annotated[int, typer.Option(help="longest training of RecTools for time_*: hours", min=1)] = 200,
) -> None:
    """Measure training speed beside RecTools."""
    torch.set_num_threads(THREADS)
    for name in only or FIGURES:
        if name not in FIGURES:
            raise typer.BadParameter(f"no figure {name!r}, only {', '.join(FIGURES)}")
        what, _, suite = name.partition("_")
        if what == "speed":
            speed(suite, workdir)
        elif what == "time":
            time_to_quality(suite, workdir, max_epochs)
        else:
            million_items(workdir)


if __name__ == "__main__":
    typer.run(main)
