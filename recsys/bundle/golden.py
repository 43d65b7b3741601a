"""One query with its answer, carried by the Bundle: a replica proves itself with it before it takes traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from recsys import schema
from recsys.arrow import pc
from recsys.config import StrictConfig
from recsys.data.dataset import Dataset
from recsys.errors import BundleMismatchError
from recsys.types import Filters, HistoryItem

_HISTORY = 20
_TOP_K = 10


class GoldenQuestion(StrictConfig):
    """A request whose history and time are pinned."""

    history: tuple[HistoryItem, ...] = Field(description="oldest first; nothing else is known of the user")
    now_ms: int = Field(description="time of the request, milliseconds since 1970 UTC")
    top_k: int = Field(ge=1)
    filters: Filters = Field(default=Filters(), description="hard rules of the request")
    exclude_seen: bool = Field(default=True, description="leave out what is in the history")

    def answered(self, item_ids: Sequence[str], scores: Sequence[float]) -> GoldenQuery:
        """With the slate that it must give from now on."""
        return GoldenQuery(**dict(self), item_ids=tuple(item_ids), scores=tuple(scores))


class GoldenQuery(GoldenQuestion):
    """The question and the slate it must give."""

    item_ids: tuple[str, ...] = Field(description="the expected slate, in order")
    scores: tuple[float, ...] = Field(description="its scores")
    tolerance: float = Field(default=1e-3, ge=0.0, description="scores that differ by no more count as equal")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not len(self.item_ids) == len(self.scores) <= self.top_k or not self.item_ids:
            raise ValueError("item_ids and scores must be of one length, from 1 to top_k")
        return self

    def compare(self, item_ids: Sequence[str], scores: Sequence[float]) -> list[str]:
        """What is wrong with an answer; empty where nothing is.

        Scores must agree within the tolerance, rank by rank and item by item. Ids must agree too, except that items
        whose expected scores are that close may swap, and that one at the border of the slate (as close to its lowest
        expected score) may give way to another.
        """
        if len(item_ids) != len(self.item_ids) or len(scores) != len(item_ids):
            return [f"{len(item_ids)} items with {len(scores)} scores, expected {len(self.item_ids)}"]
        if len(set(item_ids)) < len(item_ids):
            return ["an item appears twice"]
        expected = dict(zip(self.item_ids, self.scores, strict=True))
        close = 2 * self.tolerance  # two scores, each off by the tolerance
        border = min(self.scores)
        problems: list[str] = []
        for rank, (wanted, got) in enumerate(zip(self.item_ids, item_ids, strict=True)):
            score = float(scores[rank])
            if not abs(score - self.scores[rank]) <= self.tolerance:
                problems.append(f"rank {rank}: score {score:.6g}, expected {self.scores[rank]:.6g}")
            if got in expected and not abs(score - expected[got]) <= self.tolerance:
                problems.append(f"rank {rank}: {got!r} scored {score:.6g}, expected {expected[got]:.6g}")
            if got not in expected and not abs(score - border) <= close:
                problems.append(f"rank {rank}: {got!r} is not expected (there should be {wanted!r})")
        problems += [
            f"{missing!r} is missing"
            for missing in expected.keys() - set(item_ids)
            if expected[missing] - border > close
        ]
        return problems

    def check(self, item_ids: Sequence[str], scores: Sequence[float]) -> None:
        """Raise :class:`BundleMismatchError` with every problem :meth:`compare` finds."""
        if problems := self.compare(item_ids, scores):
            raise BundleMismatchError("the golden query is answered wrongly: " + "; ".join(problems), problems=problems)


def golden_question(dataset: Dataset) -> GoldenQuestion:
    """What a user of middling activity, cut to a short history, would ask a minute later."""
    log = dataset.positives
    lengths = np.diff(log.user_offsets)
    user = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    rows = np.arange(log.user_offsets[user], log.user_offsets[user + 1])[-_HISTORY:]
    ids = dataset.items[schema.ITEM_ID].take(pa.array(log.item_idx[rows])).to_pylist()
    times = [0] * len(rows) if log.timestamp_ms is None else log.timestamp_ms[rows].tolist()
    whole = dataset.interactions.filter(pc.greater(dataset.interactions[schema.WEIGHT], 0)).take(pa.array(rows))
    events, values = whole[schema.EVENT].to_pylist(), whole[schema.VALUE].to_pylist()
    history = tuple(
        HistoryItem(item_id=item_id, event=event, timestamp_ms=time, value=value)
        for item_id, event, time, value in zip(ids, events, times, values, strict=True)
    )
    return GoldenQuestion(history=history, now_ms=max(times, default=0) + 60_000, top_k=_TOP_K)
