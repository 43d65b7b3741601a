"""The cold start ladder on MovieLens-small, written to ``results/realtime.json``: ``make bench-cold-start``.

*Users*: the same queries, of users with ten positives or more, given only the newest 0, 1, 2, 5 or 10 of them.
*Items*: three hundred films that have at least ten training interactions lose all but their first 0, 1, 2, 5 or 10, as
if they had come out that moment; queries are those whose film is one of them. ``stand_in`` is what serving makes of an
item that no model has met: ids alone, and for the new films the ten whose texts are nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import typer
from numpy.typing import NDArray
from rows import RESULTS, write_row

from jobs.benchmark import SUITES, BenchmarkConfig
from recsys import schema
from recsys.bundle.live import NUM_STAND_INS
from recsys.config import load_config
from recsys.data.dataset import Dataset, Split, Targets
from recsys.data.prepare import prepare
from recsys.evaluation.metrics import accuracy
from recsys.evaluation.protocol import rank_scores
from recsys.files import write_json
from recsys.index.flat import FlatIndex
from recsys.models.base import FitData, Retriever, UpdateConfig
from recsys.models.extended import with_new_items
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.stand_in import StandIns
from recsys.models.text.encoder import TextEncoder, item_texts
from recsys.online.replay import lesson_of
from recsys.training.runtime import Runtime

COMMAND = "make bench-cold-start"
STEPS = (0, 1, 2, 5, 10)
NUM_NEW, LEAST = 300, 10
METRICS = ("ndcg@10", "recall@100")
Curves = dict[str, dict[str, list[float]]]


def judge(retriever: Retriever, targets: Targets, num_items: int) -> dict[str, float]:
    """Means over ``targets`` of a full ranking without what was seen."""
    ranked = [
        rank_scores(retriever.score(batch.histories, batch.now_ms), batch.left_out, 100)
        for batch in (targets[at : at + 512] for at in range(0, len(targets), 512))
    ]
    values = accuracy(
        np.concatenate(ranked), targets.relevant_item_idx, targets.relevant_offsets, ks=(10, 100), num_items=num_items
    )
    return {name: float(values[name].mean()) for name in METRICS}


def fitted(dataset: Dataset, text: NDArray[np.float32] | None, model: ESASRec) -> Retriever:
    data = FitData.of(dataset, Split.TRAIN, text_vectors=text, valid=dataset.targets(Split.VALID))
    return model.fit(data, Runtime("cpu"))


def without(dataset: Dataset, new: NDArray[np.int32], keep: int) -> Dataset:
    """``dataset`` in which items ``new`` have only their first ``keep`` training interactions."""
    table = dataset.interactions
    item = table[schema.ITEM_IDX].to_numpy()
    split = table[schema.SPLIT].to_numpy()
    time_ms = table[schema.TIMESTAMP].cast(pa.int64()).to_numpy()
    concerned = np.flatnonzero(np.isin(item, new) & (split < Split.TEST))
    order = concerned[np.lexsort((time_ms[concerned], item[concerned]))]
    first = np.searchsorted(item[order], item[order])
    dropped = order[np.arange(len(order)) - first >= keep]
    mask = np.ones(len(table), np.bool_)
    mask[dropped] = False
    return Dataset(table.filter(pa.array(mask)), dataset.items, dataset.users, dataset.info)


def of_items(targets: Targets, items: NDArray[np.int32]) -> Targets:
    """The queries whose item is one of ``items`` and was not seen."""
    seen = np.array([targets.relevant(row)[0] in targets.seen.items(row) for row in range(len(targets))])
    return targets.select(np.flatnonzero(np.isin(targets.relevant_item_idx, items) & ~seen))


def stand_ins_of(text: NDArray[np.float32], new: NDArray[np.int32]) -> tuple[StandIns, NDArray[np.int32]]:
    """Stand-ins of ``new`` among the other items, and the order of all items with the new ones last."""
    others = np.setdiff1d(np.arange(len(text), dtype=np.int32), new)
    likeness, found = FlatIndex().build(text[others]).search(text[new], NUM_STAND_INS)
    return StandIns.by_likeness(likeness, found, len(others)), np.concatenate([others, new])


class Reordered(Retriever):
    """A retriever over ``order``, its scores put back in the places of the catalogue."""

    def __init__(self, base: Retriever, order: NDArray[np.int32]) -> None:
        self.config, self.num_items = base.config, base.num_items
        self._base, self._order = base, order
        self._place = np.argsort(order).astype(np.int32)

    def score(self, histories: Any, now_ms: Any = None) -> NDArray[np.float32]:
        moved = replace(histories, item_idx=self._place[histories.item_idx])
        scores = np.empty((len(histories), self.num_items), np.float32)
        scores[:, self._order] = self._base.score(moved, now_ms)
        return scores

    def save_weights(self, folder: Path) -> None:
        raise NotImplementedError


class Served:
    """What serving makes of films that come out once the model is fitted: stand-ins, and then ``jobs.update``."""

    def __init__(
        self, by_number: Mapping[int, Dataset], text: NDArray[np.float32], new: NDArray[np.int32], model: ESASRec
    ) -> None:
        self._stand_ins, self._order = stand_ins_of(text, new)
        self._model = model
        self._by_number = by_number
        self._num_known = self._stand_ins.num_known
        self._base = fitted(self._reordered(0, self._num_known), None, model)

    def after(self, number: int) -> Retriever:
        """Once their first ``number`` interactions were learned from the log; none: with stand-ins alone."""
        if not number:
            return Reordered(with_new_items(self._base, self._stand_ins), self._order)
        dataset = self._reordered(number, len(self._order))
        data, online = FitData.of(dataset, Split.TRAIN), UpdateConfig()
        lesson = lesson_of(
            data.histories,
            (dataset.positives.item_idx >= self._num_known) & (dataset.positives.split == Split.TRAIN),
            max_length=self._model.max_length,
            replay=online.replay,
            seed=0,
            stand_ins=self._stand_ins,
        )
        return Reordered(
            self._model.update(self._base, replace(data, lesson=lesson), Runtime("cpu"), online), self._order
        )

    def _reordered(self, number: int, num_items: int) -> Dataset:
        """The first ``num_items`` in order, and what was done with them."""
        dataset = self._by_number[number]
        place = np.argsort(self._order)
        table = dataset.interactions
        item = place[table[schema.ITEM_IDX].to_numpy()]
        column = table.schema.get_field_index(schema.ITEM_IDX)
        table = table.set_column(column, table.schema.field(column), pa.array(item.astype(np.int32)))
        table = table.filter(pa.array(item < num_items))
        items = dataset.items.take(pa.array(self._order[:num_items]))
        return Dataset(table, items, dataset.users, dataset.info.model_copy(update={"num_items": num_items}))


def curves_of(steps: dict[str, Callable[[int], tuple[Retriever, Targets]]], num_items: int, title: str) -> Curves:
    found: Curves = {name: {metric: [] for metric in METRICS} for name in steps}
    for name, make in steps.items():
        for number in STEPS:
            retriever, targets = make(number)
            for metric, value in judge(retriever, targets, num_items).items():
                found[name][metric].append(value)
        print(
            title, name, {metric: [round(v, 4) for v in values] for metric, values in found[name].items()}, flush=True
        )
    return found


def main(workdir: Annotated[Path, typer.Option(help="folder of the prepared data")] = Path("runs/cold-start")) -> None:
    """Measure the ladder."""
    torch.set_num_threads(2)
    config = load_config(BenchmarkConfig, SUITES / "families_movielens.yaml")
    dataset = prepare(config.data, 0, workdir)
    assert config.encoder is not None
    text = TextEncoder.load(config.encoder).encode(item_texts(dataset.items, config.encoder))
    ids_model, text_model = (config.system(name).model for name in ("esasrec", "esasrec_text"))
    assert isinstance(ids_model, ESASRec) and isinstance(text_model, ESASRec)
    test = dataset.targets(Split.TEST)

    popular = Popularity().fit(FitData.of(dataset, Split.TRAIN), Runtime("cpu"))
    ids, texts = fitted(dataset, None, ids_model), fitted(dataset, text, text_model)
    old = test.select(np.flatnonzero(test.histories.lengths >= max(STEPS)))

    def cut(number: int) -> Targets:
        return replace(old, histories=old.histories.last(number))

    users = curves_of(
        {
            "popularity": lambda number: (popular, cut(number)),
            "ids": lambda number: (ids, cut(number)),
            "ids and text": lambda number: (texts, cut(number)),
        },
        dataset.num_items,
        "users",
    )

    rng = np.random.default_rng(0)
    often = np.flatnonzero(dataset.train_counts() >= LEAST)
    new = np.sort(rng.choice(often, NUM_NEW, replace=False)).astype(np.int32)
    asked = of_items(test, new)
    print(f"{len(old)} queries of users, {len(asked)} of new items", flush=True)
    by_number = {number: without(dataset, new, number) for number in STEPS}
    served = Served(by_number, text, new, ids_model)
    items = curves_of(
        {
            "popularity": lambda n: (Popularity().fit(FitData.of(by_number[n], Split.TRAIN), Runtime("cpu")), asked),
            "ids": lambda number: (fitted(by_number[number], None, ids_model), asked),
            "ids and text": lambda number: (fitted(by_number[number], text, text_model), asked),
            "stand-ins, then updates": lambda number: (served.after(number), asked),
        },
        dataset.num_items,
        "items",
    )
    report(users, items, len(old), len(asked))


def report(users: Curves, items: Curves, num_users: int, num_items: int) -> None:
    """Rows, a file and the plot."""
    protocol = "MovieLens-small, global time split, full ranking without what was seen, one seed; "
    what = protocol + f"users: {num_users} queries given their newest n positives"
    gain = users["ids and text"]["ndcg@10"][1] / users["popularity"]["ndcg@10"][1]
    write_row(
        "realtime", "cold_user_gain", gain, unit="x", bar="> 1", passes=gain > 1, command=COMMAND, seeds=[0],
        protocol=what + "; NDCG@10 of ids and text after one interaction, over popularity", details={"curves": users},
    )  # fmt: skip
    what = protocol + (
        f"items: {NUM_NEW} films cut to their first n training interactions, {num_items} queries for them; recall@100"
    )
    shown = max(items["stand-ins, then updates"]["recall@100"][0], items["ids and text"]["recall@100"][0])
    base = items["ids"]["recall@100"][0]
    write_row(
        "realtime", "cold_item_recall", shown, unit="recall@100", bar="> that of ids alone and of popularity",
        passes=shown > max(base, items["popularity"]["recall@100"][0]), command=COMMAND, seeds=[0],
        protocol=what + " of the better of text and stand-ins, for films without any interaction",
        details={"curves": items},
    )  # fmt: skip
    folder = RESULTS / "realtime"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cold_start.json", {"steps": STEPS, "users": users, "items": items})
    plot(users, items, folder / "cold_start.svg")


def plot(users: Curves, items: Curves, path: Path) -> None:
    """Both ladders."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, curves, metric, title in (
        (axes[0], users, "ndcg@10", "users, by what is known of them"),
        (axes[1], items, "recall@100", "items, by training interactions"),
    ):
        for name, values in curves.items():
            axis.plot(range(len(STEPS)), values[metric], "o-", label=name)
        axis.set(title=title, ylabel=metric, xlabel="interactions", xticks=range(len(STEPS)), xticklabels=STEPS)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
