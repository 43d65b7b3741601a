"""RecTools models as systems of a suite: ``python rectools_peer.py sasrec --factors 64 FOLDER``.

Runs in the environment of ``requirements.txt`` and knows nothing of this project but the files in ``FOLDER``, which
``jobs.benchmark`` describes (see ``jobs.external``). With ``--lockstep`` every epoch waits for a line on standard
input and answers with a line of JSON, so that another training can be measured in turn with this one; with
``--checkpoint`` it can be killed, and goes on after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from implicit.als import AlternatingLeastSquares
from implicit.nearest_neighbours import CosineRecommender
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import (
    BERT4RecModel,
    EASEModel,
    ImplicitALSWrapperModel,
    ImplicitItemKNNWrapperModel,
    SASRecModel,
)
from scipy.sparse import csr_matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=50, help="newest interactions that are read")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=128, help="sequences per step")
    parser.add_argument("--epochs", type=int, default=100, help="at most")
    parser.add_argument("--patience", type=int, default=5, help="epochs without a better validation NDCG@10")
    parser.add_argument("--regularization", default="500", help="EASE; of several (with commas) the best on validation")
    parser.add_argument("--iterations", type=int, default=15, help="of ALS")
    parser.add_argument("--alpha", type=float, default=1.0, help="of ALS")
    parser.add_argument("--neighbours", type=int, default=100, help="of ItemKNN")
    parser.add_argument("--threads", type=int, default=0, help="0 for torch's default")
    parser.add_argument("--lockstep", action="store_true")
    parser.add_argument(
        "--checkpoint", help="file that holds the state after each epoch; begun from where there is one"
    )
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    task = json.loads((args.folder / "task.json").read_text())
    train = pq.read_table(args.folder / "train.parquet")
    valid, test = (pq.read_table(args.folder / f"{name}.parquet") for name in ("valid", "test"))
    started = time.perf_counter()
    model = MODELS[args.model](args, task, train, valid)
    cost = {
        "train_seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "num_parameters": model.num_parameters,
        "num_workers": 1,
        "curve": model.curve,
    }
    ranked, ranked_new = model.rank(test, task["depth"])
    out = {"ranked": pa.array(list(ranked)), "ranked_new": pa.array(list(ranked_new))}
    pq.write_table(pa.table(out), args.folder / "ranked.parquet")
    (args.folder / "training.json").write_text(json.dumps(cost))


def peak_memory_bytes() -> int:
    """Largest resident size of this process; what getrusage says counts the process that started it, too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def interactions(table: pa.Table) -> pd.DataFrame:
    """RecTools' columns; rows are in order within a user, and that order is what models see."""
    order = np.arange(len(table))
    return pd.DataFrame(
        {
            Columns.User: table["user_idx"].to_numpy(),
            Columns.Item: table["item_idx"].to_numpy(),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(order, unit="s"),
        }
    )


class Model:
    """A fitted model that scores all items for histories."""

    num_parameters: int
    curve: list[dict[str, float]]

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """float32 [B, N]; -inf for what the model does not know"""
        raise NotImplementedError

    def rank(self, queries: pa.Table, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [Q, depth] of all items and of the items not seen, -1 where there is no more."""
        every, new = [], []
        for start in range(0, len(queries), 512):
            part = queries.slice(start, 512)
            scores = self.scores(part["history"].to_numpy())
            every.append(_best(scores, depth))
            for row, seen in enumerate(part["seen"].to_numpy()):
                scores[row, seen] = -np.inf
            new.append(_best(scores, depth))
        return np.concatenate(every), np.concatenate(new)

    def ndcg(self, queries: pa.Table, k: int = 10) -> float:
        """Mean NDCG@k, items already seen left out where the task says so."""
        discount = 1 / np.log2(np.arange(k) + 2)
        gains = []
        ranked = self.rank(queries, k)[1 if self.exclude_seen else 0]
        for found, relevant in zip(ranked, queries["relevant"].to_numpy(), strict=True):
            ideal = discount[: len(relevant)].sum()
            gains.append((np.isin(found, relevant) * discount).sum() / ideal)
        return float(np.mean(gains))

    exclude_seen = True


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    depth = min(depth, scores.shape[1])
    top = np.sort(np.argpartition(-scores, depth - 1, axis=1)[:, :depth], axis=1)
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)
    return np.where(np.isfinite(np.take_along_axis(scores, top, axis=1)), top, -1).astype(np.int32)


class MatrixModel(Model):
    """One that sees neither order nor time."""

    def take(self, task: dict[str, Any], train: pa.Table) -> None:
        """What is known before fitting."""
        self.num_items, self.exclude_seen = task["num_items"], task["exclude_seen"]
        self.curve = []
        self.dataset = Dataset.construct(interactions(train))
        inner = np.arange(self.dataset.item_id_map.size)
        self.known = self.dataset.item_id_map.convert_to_external(inner).astype(int)
        counts = np.bincount(train["item_idx"].to_numpy(), minlength=self.num_items)
        self.popularity = 1e-6 * counts / len(train)
        """answers the empty history"""

    def profiles(self, histories: list[np.ndarray]) -> csr_matrix:
        """float32 [B, N]: which items each history holds, once each"""
        items = [np.unique(np.asarray(history, int)) for history in histories]
        offsets = np.cumsum([0, *map(len, items)])
        values = np.ones(offsets[-1], np.float32)
        return csr_matrix((values, np.concatenate(items), offsets), (len(items), self.num_items))


class Als(MatrixModel):
    """Implicit ALS; the factors of a history are solved for."""

    def __init__(self, args: Any, task: dict[str, Any], train: pa.Table, valid: pa.Table) -> None:
        self.take(task, train)
        model = ImplicitALSWrapperModel(
            AlternatingLeastSquares(
                factors=args.factors,
                regularization=float(args.regularization),
                alpha=args.alpha,
                iterations=args.iterations,
                random_state=task["seed"],
            )
        )
        model.fit(self.dataset)
        self.als = model.model
        self.num_parameters = self.als.item_factors.size

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        profiles = self.profiles(histories)[:, self.known].tocsr()
        users = self.als.recalculate_user(np.arange(len(histories)), profiles)
        out = np.full((len(histories), self.num_items), -np.inf, np.float32)
        out[:, self.known] = users @ self.als.item_factors.T + self.popularity[self.known]
        return out


class Knn(MatrixModel):
    """Cosine neighbours of items."""

    def __init__(self, args: Any, task: dict[str, Any], train: pa.Table, valid: pa.Table) -> None:
        self.take(task, train)
        model = ImplicitItemKNNWrapperModel(CosineRecommender(K=args.neighbours))
        model.fit(self.dataset)
        self.similarity = model.model.similarity.astype(np.float32)
        self.num_parameters = self.similarity.nnz

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        found = (self.profiles(histories)[:, self.known] @ self.similarity).toarray()
        out = np.full((len(histories), self.num_items), -np.inf, np.float32)
        out[:, self.known] = found + self.popularity[self.known]
        return out


class Ease(MatrixModel):
    """EASE; its regularization is chosen on validation."""

    def __init__(self, args: Any, task: dict[str, Any], train: pa.Table, valid: pa.Table) -> None:
        self.take(task, train)
        fitted = []
        for regularization in map(float, args.regularization.split(",")):
            model = EASEModel(regularization=regularization)
            model.fit(self.dataset)
            self.weight = np.zeros((self.num_items, self.num_items), np.float32)
            self.weight[np.ix_(self.known, self.known)] = model.weight
            quality = self.ndcg(valid)
            print(f"EASE regularization {regularization:g}: validation ndcg@10 {quality:.4f}", flush=True)
            fitted.append((quality, self.weight))
        self.weight = max(fitted, key=lambda pair: pair[0])[1]
        self.num_parameters = int(np.count_nonzero(self.weight))

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        return self.profiles(histories) @ self.weight + self.popularity


class Sasrec(Model):
    """SASRec with full softmax, stopped early on validation, the weights of its best epoch kept."""

    kind: type[Any] = SASRecModel
    last: tuple[int, ...] = ()
    """what stands after the history"""

    def __init__(self, args: Any, task: dict[str, Any], train: pa.Table, valid: pa.Table) -> None:
        self.num_items, self.exclude_seen, self.length = task["num_items"], task["exclude_seen"], args.length
        self.curve = []
        seed_everything(task["seed"], workers=True)
        checkpoint = args.checkpoint if args.checkpoint and Path(args.checkpoint).exists() else None
        watch = Watch(self, valid, args, checkpoint)
        WATCHES.append(watch)
        model = self.kind(
            n_blocks=args.blocks,
            n_heads=args.heads,
            n_factors=args.factors,
            dropout_rate=args.dropout,
            session_max_len=args.length,
            batch_size=args.batch,
            lr=args.learning_rate,
            loss="softmax",
            epochs=args.epochs,
            recommend_torch_device="cpu",
            get_trainer_func=trainer,
            get_trainer_func_kwargs={"epochs": args.epochs, "checkpoint": checkpoint},
        )
        self.model = model
        self.counts = np.bincount(train["item_idx"].to_numpy(), minlength=self.num_items)
        model.fit(Dataset.construct(interactions(train)))
        self.net = model.lightning_model.torch_model
        self.net.load_state_dict(watch.best)
        self.net.eval()
        self.num_parameters = sum(parameter.numel() for parameter in self.net.parameters())

    def know(self) -> None:
        """Take over the item numbers that RecTools gave, before the first scores."""
        prepared = self.model.data_preparator
        known = np.asarray(prepared.get_known_item_ids()).astype(int)
        self.inner = np.zeros(self.num_items, np.int64)  # 0 is padding
        self.inner[known] = prepared.get_known_items_sorted_internal_ids()

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        x = np.zeros((len(histories), self.length), np.int64)
        for row, history in enumerate(histories):
            inner = self.inner[np.asarray(history, int)]
            inner = inner[inner > 0]
            if len(inner):
                read = [*inner, *self.last][-self.length :]
                x[row, -len(read) :] = read
        net = self.model.lightning_model.torch_model
        with torch.no_grad():
            items = net.item_model.get_all_embeddings()
            users = net.encode_sessions({"x": torch.from_numpy(x)}, items)[:, -1]
            found = (users @ items.T).numpy()
        out = np.where(self.inner > 0, found[:, self.inner], -np.inf)
        out[(x == 0).all(1)] = self.counts  # the model answers no empty history: popularity does
        return out


class Bert4rec(Sasrec):
    """BERT4Rec likewise; a mask (RecTools numbers it 1, before the items) asks for what is next."""

    kind = BERT4RecModel
    last = (1,)


MODELS: dict[str, type[Model]] = {"sasrec": Sasrec, "bert4rec": Bert4rec, "ease": Ease, "als": Als, "item_knn": Knn}
WATCHES: list[Callback] = []
"""RecTools knows a trainer by the name of the function that makes it, so what goes into it stands here."""


class Continued(Trainer):
    """RecTools asks for no checkpoint to begin from."""

    checkpoint: str | None = None

    def fit(self, *args: Any, **kwargs: Any) -> None:
        super().fit(*args, **kwargs, ckpt_path=self.checkpoint)


def trainer(epochs: int, checkpoint: str | None) -> Trainer:
    """A trainer that leaves everything but training to the callbacks."""
    made = Continued(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=WATCHES,
    )
    made.checkpoint = checkpoint
    return made


class Watch(Callback):
    """Times epochs, judges them, stops, and keeps the best weights."""

    def __init__(self, model: Sasrec, valid: pa.Table, args: Any, checkpoint: str | None) -> None:
        self.model, self.valid, self.args, self.checkpoint = model, valid, args, checkpoint
        self.best: dict[str, torch.Tensor] = {}
        self.best_quality, self.best_epoch = -1.0, 0
        self.knows = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"best": self.best, "best_quality": self.best_quality, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """RecTools trains with a copy of the trainer; what is seen there must be seen here."""
        return self

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if self.args.lockstep and not sys.stdin.readline():
            sys.exit("standard input was closed")
        if self.checkpoint is not None:
            # RecTools has drawn new weights over those of the checkpoint.
            module.load_state_dict(torch.load(self.checkpoint, weights_only=False)["state_dict"])
            self.checkpoint = None
        self.started, self.cpu = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu
        if not self.knows:
            self.model.know()
            self.knows = True
        module.eval()
        begun = time.perf_counter()
        quality = self.model.ndcg(self.valid)
        judged = time.perf_counter() - begun
        module.train()
        epoch = trainer.current_epoch + 1
        loss = float(trainer.callback_metrics["train_loss"])
        row = {"epoch": epoch, "loss": loss, "ndcg@10": quality}
        self.model.curve.append(row)
        if quality > self.best_quality:
            self.best_quality, self.best_epoch = quality, epoch
            self.best = {name: tensor.clone() for name, tensor in module.torch_model.state_dict().items()}
        if epoch - self.best_epoch >= self.args.patience:
            trainer.should_stop = True
        told = {**row, "seconds": seconds, "cpu_seconds": cpu, "validation_seconds": judged,
                "stopped": bool(trainer.should_stop or epoch == self.args.epochs)}  # fmt: skip
        if self.args.checkpoint:
            trainer.save_checkpoint(self.args.checkpoint + ".tmp")
            Path(self.args.checkpoint + ".tmp").replace(self.args.checkpoint)
        if self.args.lockstep:
            print(json.dumps(told), flush=True)
        else:
            print(f"epoch {epoch}: loss {loss:.4f}, ndcg@10 {quality:.4f}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
