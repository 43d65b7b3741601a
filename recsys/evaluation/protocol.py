"""Evaluation of any ranking system on the queries of a split: checked for leaks, warm and cold apart.

A *system* is a function from :class:`~recsys.data.dataset.Targets` to ranked items. It must rank the whole catalogue,
as metrics over sampled candidates do not order systems as full ones do (Krichene and Rendle, KDD 2020), and leave out
``targets.left_out``, which is checked, so that systems are compared on equal terms.

A *view* says what may be asked for. ``new``: items the user has not seen; seen items are excluded and are not
relevant, and a query with nothing else relevant is left out (and counted). ``with_repeats``: everything; the system
is given empty ``seen`` histories. Next basket reports both, next item one of them (``EvaluationConfig.exclude_seen``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from recsys.config import StrictConfig
from recsys.data.dataset import Dataset, Split, Targets
from recsys.data.histories import Histories
from recsys.errors import EmptyDataError, LeakageError, ModelError
from recsys.evaluation import metrics
from recsys.models.base import Retriever
from recsys.types import BoolArray, Float64Array, FloatArray, Int32Array, Int64Array

RankFn = Callable[[Targets], Int32Array]
"""Targets (B queries) to item_idx int32 [B, K], best first, K >= the largest ``k``, -1 where there is nothing more."""

View = Literal["new", "with_repeats"]

SEGMENTS = ("all", "warm_users", "cold_users", "warm_items", "cold_items")
"""Users are warm with a positive in train. For items only the warm (or cold) relevant ones count as relevant."""


class EvaluationConfig(StrictConfig):
    """How systems are judged."""

    ks: tuple[int, ...] = Field(default=(5, 10, 20), description="depths k of the metrics, in items")
    main_metric: str = Field(default="ndcg@10", description="metric that decides which baseline is the best one")
    exclude_seen: bool = Field(
        default=True,
        description="leave items the user has seen out of rankings and targets (next item; next basket reports both)",
    )
    max_queries: int | None = Field(
        default=None,
        ge=1,
        description="judge a seeded sample of users with about this many queries; null for all",
    )
    batch_size: int = Field(default=256, ge=1, description="queries ranked at once")
    num_bootstrap: int = Field(default=1000, ge=100, description="resamples of users for each interval and p value")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="coverage of the intervals, as a fraction")
    seed: int = Field(default=0, ge=0, description="seed of the sample of users and of the resampling")

    @field_validator("ks")
    @classmethod
    def _check_ks(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
            raise ValueError("ks must name at least one depth, each at least 1 and none twice")
        return tuple(sorted(ks))

    @field_validator("main_metric")
    @classmethod
    def _check_main_metric(cls, name: str) -> str:
        family, _, k = name.partition("@")
        if family not in metrics.ACCURACY or not k.isdigit():
            raise ValueError(f"{name!r} is none of {', '.join(metrics.ACCURACY)} followed by @ and a depth")
        return name

    @property
    def depth(self) -> int:
        """The largest ``k``, that of :attr:`main_metric` included."""
        return max(*self.ks, int(self.main_metric.partition("@")[2]))

    @property
    def all_ks(self) -> tuple[int, ...]:
        """``ks`` and the depth of :attr:`main_metric`, ascending."""
        return tuple(sorted({*self.ks, int(self.main_metric.partition("@")[2])}))

    @property
    def resampling(self) -> dict[str, Any]:
        """The keyword arguments of :func:`~recsys.evaluation.significance.bootstrap` and ``paired_difference``."""
        return {"num_resamples": self.num_bootstrap, "confidence": self.confidence, "seed": self.seed}


@dataclass(frozen=True)
class Segment:
    """Metrics of the queries of one segment."""

    rows: Int64Array
    """int64 [Q]: rows of the split's targets, ascending"""
    user_idx: Int32Array
    """int32 [Q]"""
    values: Mapping[str, Float64Array]
    """per metric float64 [Q]"""


@dataclass(frozen=True)
class ViewResult:
    """One system under one view."""

    view: View
    segments: Mapping[str, Segment]
    """per name in :data:`SEGMENTS`; a segment may hold no queries"""
    slates: Mapping[str, float]
    """metrics of the slates as a whole: ``coverage@k``, ``novelty@k``, ``diversity@k``, ``popularity_lift@k``"""
    num_left_out: int
    """queries without a relevant item under this view"""


@dataclass(frozen=True)
class SystemResult:
    """One system, judged."""

    name: str
    views: tuple[ViewResult, ...]
    """the first one is the headline"""
    num_targets: int
    """queries of the split before sampling"""


def evaluate_ranker(
    name: str, rank_fn: RankFn, targets: Targets, dataset: Dataset, config: EvaluationConfig
) -> SystemResult:
    """Judge ``rank_fn`` on ``targets`` of ``dataset``.

    Raises :class:`LeakageError` for targets that see their own future, :class:`ModelError` for a system that returns
    unusable rankings, :class:`EmptyDataError` where there is nothing to judge.
    """
    if not len(targets):
        raise EmptyDataError(f"{name}: the split has no queries to evaluate")
    check_no_leak(targets, dataset)
    rows = sample_queries(targets, config)
    chosen = targets.select(rows)
    views: tuple[View, ...] = ("new" if config.exclude_seen else "with_repeats",)
    if dataset.info.protocol == "next_basket":
        views = ("with_repeats", "new")
    results = tuple(_evaluate_view(name, rank_fn, chosen, rows, dataset, config, view) for view in views)
    return SystemResult(name, results, len(targets))


def retriever_ranker(retriever: Retriever, dataset: Dataset, config: EvaluationConfig) -> RankFn:
    """The system that ranks the whole catalogue of ``dataset`` by :meth:`Retriever.score`, without seen items.

    It raises :class:`ModelError` for scores that do not cover the catalogue.
    """

    def rank(targets: Targets) -> Int32Array:
        scores = retriever.score(targets.histories, targets.now_ms)
        if scores.shape != (len(targets), dataset.num_items):
            raise ModelError(
                f"scores of shape {scores.shape} for {len(targets)} queries and {dataset.num_items} items: "
                "a retriever is judged on the whole catalogue"
            )
        return rank_scores(scores, targets.left_out, config.depth)

    return rank


def rank_scores(scores: FloatArray, seen: Histories, k: int) -> Int32Array:
    """The ``k`` best items per row of ``scores`` float32 [B, N] without those of ``seen``: int32 [B, k], -1 padded.

    Equal scores are ordered by ``item_idx``, also at the cut, so that the result does not depend on the machine.
    """
    num_items = scores.shape[1]
    if not np.isfinite(scores).all():
        raise ModelError(f"a score of query {int(np.argmin(np.isfinite(scores).all(axis=1)))} is not finite")
    masked = scores.astype(np.float32, copy=True)
    packed = seen.pack()
    masked[np.repeat(np.arange(len(seen)), packed.lengths), packed.item_idx] = -np.inf
    depth = min(k, num_items)
    # The k-th best score splits the row: all above it are in, and those equal to it fill up from the lowest item_idx.
    border = np.partition(masked, num_items - depth, axis=1)[:, num_items - depth, None]
    taken = masked >= border
    tied = np.flatnonzero(taken.sum(axis=1) > depth)
    above, equal = masked[tied] > border[tied], masked[tied] == border[tied]
    room = depth - above.sum(axis=1, keepdims=True)
    taken[tied] = above | (equal & (np.cumsum(equal, axis=1) <= room))
    item_idx = np.nonzero(taken)[1].reshape(len(masked), depth)
    best = np.take_along_axis(masked, item_idx, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    best, item_idx = np.take_along_axis(best, order, axis=1), np.take_along_axis(item_idx, order, axis=1)
    ranked = np.full((len(masked), k), -1, np.int32)
    ranked[:, :depth] = np.where(best > -np.inf, item_idx, -1)
    return ranked


def check_no_leak(targets: Targets, dataset: Dataset) -> None:
    """Raise :class:`LeakageError`, naming the query, unless every history ends before its target, in time and in row.

    Rows decide between interactions at the same millisecond (next item); a basket's own millisecond is all target,
    so nothing of it may be in the history, nor in what was seen.
    """
    if not len(targets):
        return
    basket = dataset.info.protocol == "next_basket"
    positives, log = dataset.positives, dataset.log
    users, target_rows = targets.user_idx, targets.histories.stops
    heads = targets.relevant_offsets[:-1]
    for part, view, whole in (("history", targets.histories, positives), ("seen history", targets.seen, log)):
        if view.item_idx is not whole.item_idx and not np.array_equal(view.item_idx, whole.item_idx):
            raise LeakageError(f"the {part} log of the targets is not the dataset's: its order cannot be checked")
        outside = (view.starts < whole.user_offsets[users]) | (view.stops >= whole.user_offsets[users + 1])
        _refuse(outside, f"the {part} leaves no room for the target within the user's log")
        if not (basket and whole is log):  # a basket may begin with something that is no positive
            _refuse(
                whole.item_idx[np.minimum(view.stops, len(whole.item_idx) - 1)] != targets.relevant_item_idx[heads],
                f"the {part} does not end right before the target",
            )
        _refuse(whole.split[view.stops] == Split.TRAIN, f"the target after the {part} is part of train")
        if whole.timestamp_ms is not None:
            assert targets.now_ms is not None, "data with time has targets with time"
            last = whole.timestamp_ms[np.maximum(view.stops - 1, 0)]
            late = last >= targets.now_ms if basket else last > targets.now_ms
            _refuse(late & (view.lengths > 0), f"the {part} reaches past the time of the target")
            _refuse(whole.timestamp_ms[view.stops] != targets.now_ms, "the target did not happen at the query's time")
    lengths = np.diff(targets.relevant_offsets)
    if basket:
        wrong = _not_the_basket(targets, dataset)
    else:
        gather = np.repeat(target_rows - heads, lengths) + np.arange(len(targets.relevant_item_idx))
        wrong_row = positives.item_idx[np.minimum(gather, len(positives.item_idx) - 1)] != targets.relevant_item_idx
        wrong = np.logical_or.reduceat(wrong_row, heads)
    _refuse(wrong, "the relevant items are not those that follow the history")
    if dataset.info.borders_ms is not None and targets.now_ms is not None:
        _refuse(targets.now_ms < dataset.info.borders_ms[0], "the query lies before the end of train")


def _not_the_basket(targets: Targets, dataset: Dataset) -> BoolArray:
    """bool [B]: where the relevant items are not, each once, the positives of the user at the query's time."""
    log = dataset.positives
    assert log.timestamp_ms is not None, "baskets are told apart by time"
    key = np.stack([log.user_idx.astype(np.int64), log.timestamp_ms], axis=1)
    ends = np.append(np.flatnonzero((key[1:] != key[:-1]).any(axis=1)) + 1, len(key))
    stops = ends[np.searchsorted(ends, targets.histories.stops, side="right")]
    basket = Histories(log.item_idx, targets.histories.stops, stops).pack()
    query = np.arange(len(targets))
    held = np.unique(np.repeat(query, basket.lengths) * dataset.num_items + basket.item_idx)
    told = np.repeat(query, np.diff(targets.relevant_offsets)) * dataset.num_items + targets.relevant_item_idx
    once, counts = np.unique(told, return_counts=True)
    wrong = np.concatenate([np.setxor1d(held, once), once[counts > 1]]) // dataset.num_items
    return np.isin(query, wrong)


def _refuse(bad: BoolArray, why: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise LeakageError(f"query {row}: {why} ({int(bad.sum())} of {len(bad)} queries)", row=row)


def sample_queries(targets: Targets, config: EvaluationConfig) -> Int64Array:
    """int64 [Q]: the rows of ``targets`` to judge, ascending; all of a sampled user's queries, at least one user's.

    The sample depends on the targets, ``max_queries`` and the seed alone: every system gets the same one.
    """
    if config.max_queries is None or len(targets) <= config.max_queries:
        return np.arange(len(targets), dtype=np.int64)
    users, cluster = np.unique(targets.user_idx, return_inverse=True)
    order = np.random.default_rng(config.seed).permutation(len(users))
    total = np.cumsum(np.bincount(cluster)[order])
    num_users = max(1, int(np.searchsorted(total, config.max_queries, side="right")))
    return np.flatnonzero(np.isin(cluster, order[:num_users]))


def _keep_relevant(targets: Targets, keep: BoolArray) -> tuple[Targets, Int64Array]:
    """The queries with only the relevant items marked in ``keep`` bool [R], and which rows still have one."""
    query_of = np.repeat(np.arange(len(targets)), np.diff(targets.relevant_offsets))[keep]
    lengths = np.bincount(query_of, minlength=len(targets))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    kept = replace(targets, relevant_item_idx=targets.relevant_item_idx[keep], relevant_offsets=offsets)
    rows = np.flatnonzero(lengths)
    return kept.select(rows), rows


def _distinct_relevant(targets: Targets, num_items: int) -> BoolArray:
    """bool [R]: the first mention of each relevant item of a query."""
    query_of = np.repeat(np.arange(len(targets), dtype=np.int64), np.diff(targets.relevant_offsets))
    _, first = np.unique(query_of * num_items + targets.relevant_item_idx, return_index=True)
    mask = np.zeros(len(query_of), bool)
    mask[first] = True
    return mask


def _not_seen(targets: Targets, num_items: int) -> BoolArray:
    """bool [R]: the relevant items that their user had not seen before."""
    new = np.empty(len(targets.relevant_item_idx), bool)
    for rows, batch in _batches(targets, 4096):
        packed = batch.seen.pack()
        seen = np.repeat(np.arange(len(batch), dtype=np.int64), packed.lengths) * num_items + packed.item_idx
        query_of = np.repeat(np.arange(len(batch), dtype=np.int64), np.diff(batch.relevant_offsets))
        lo, hi = targets.relevant_offsets[rows.start], targets.relevant_offsets[rows.stop]
        new[lo:hi] = ~np.isin(query_of * num_items + batch.relevant_item_idx, seen)
    return new


def _batches(targets: Targets, size: int) -> Iterator[tuple[slice, Targets]]:
    for start in range(0, len(targets), size):
        rows = slice(start, min(start + size, len(targets)))
        yield rows, targets[rows]


def _evaluate_view(
    name: str,
    rank_fn: RankFn,
    targets: Targets,
    rows: Int64Array,
    dataset: Dataset,
    config: EvaluationConfig,
    view: View,
) -> ViewResult:
    num_items = dataset.num_items
    wanted = _distinct_relevant(targets, num_items)
    if view == "new":
        wanted &= _not_seen(targets, num_items)
    else:
        targets = replace(targets, repeats=True)
    asked, kept = _keep_relevant(targets, wanted)
    if not len(asked):
        raise EmptyDataError(f"{name}: no query has a relevant item in the view {view!r}", system=name, view=view)
    ranked = np.empty((len(asked), config.depth), np.int32)
    for batch_rows, batch in _batches(asked, config.batch_size):
        ranked[batch_rows] = _checked(name, rank_fn(batch), batch, num_items, config.depth)

    def judge(part: Targets, part_ranked: Int32Array, part_rows: Int64Array) -> Segment:
        values = metrics.accuracy(
            part_ranked, part.relevant_item_idx, part.relevant_offsets, ks=config.all_ks, num_items=num_items
        )
        return Segment(part_rows, part.user_idx, values)

    split_counts = dataset.train_counts()
    train = dataset.positives
    warm_user = np.bincount(train.user_idx[train.split == Split.TRAIN], minlength=dataset.num_users) > 0
    whole = judge(asked, ranked, rows[kept])
    segments = {"all": whole}
    for segment, mask in (("warm_users", warm_user[asked.user_idx]), ("cold_users", ~warm_user[asked.user_idx])):
        values = {metric: value[mask] for metric, value in whole.values.items()}
        segments[segment] = Segment(whole.rows[mask], whole.user_idx[mask], values)
    warm_item = split_counts[asked.relevant_item_idx] > 0
    for segment, keep in (("warm_items", warm_item), ("cold_items", ~warm_item)):
        part, part_rows = _keep_relevant(asked, keep)
        segments[segment] = judge(part, ranked[part_rows], whole.rows[part_rows])
    profiles = asked.histories.pack()
    categories = metrics.CategoryTable(dataset.items["categories"])
    slates: dict[str, float] = {}
    for k in config.all_ks:
        cut = ranked[:, :k]
        slates[f"coverage@{k}"] = metrics.coverage(cut, num_items)
        slates[f"novelty@{k}"] = metrics.novelty(cut, split_counts)
        slates[f"diversity@{k}"] = metrics.category_diversity(cut, categories)
        slates[f"popularity_lift@{k}"] = metrics.popularity_lift(cut, profiles.item_idx, profiles.offsets, split_counts)
    return ViewResult(view, segments, slates, len(targets) - len(asked))


def _checked(name: str, ranked: Int32Array, targets: Targets, num_items: int, depth: int) -> Int32Array:
    """``ranked`` cut to ``depth``, or a :class:`ModelError` that names the first query with an unusable ranking."""

    def refuse(bad: BoolArray, why: str) -> None:
        if bad.any():
            row = int(np.argmax(bad.any(axis=1)))
            raise ModelError(
                f"{name}: the ranking for user_idx {int(targets.user_idx[row])} {why}", system=name, row=row
            )

    if ranked.ndim != 2 or len(ranked) != len(targets) or ranked.shape[1] < depth:
        raise ModelError(
            f"{name}: rankings of shape {ranked.shape}, not ({len(targets)}, {depth} or more)", system=name
        )
    ranked = ranked[:, :depth].astype(np.int32, copy=False)
    refuse((ranked < -1) | (ranked >= num_items), f"holds an item outside 0 to {num_items - 1}")
    refuse((ranked[:, :-1] < 0) & (ranked[:, 1:] >= 0), "goes on after a -1")
    ordered = np.sort(ranked, axis=1)
    refuse((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), "holds an item twice")
    packed = targets.left_out.pack()
    seen = metrics.hits(ranked, packed.item_idx, packed.offsets, num_items)
    refuse(seen, "holds an item that the user has seen")
    return ranked
