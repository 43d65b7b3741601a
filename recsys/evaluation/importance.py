"""How much a ranker owes to each of its features, and which of them it can do without.

Permutation importance (Breiman, Machine Learning 45(1), 2001): a feature's values are those of other queries, and what
NDCG@10 loses by that is what the feature is worth to this ranker. Features that say nearly the same share their worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recsys.data.features import FEATURE_NAMES
from recsys.evaluation.significance import Interval, bootstrap
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import PADDING, RankingBatch
from recsys.types import Float64Array, FloatArray

Score = Callable[[RankingBatch], FloatArray]
_AT_ONCE = 128


def permutation_importance(
    score: Score, examples: RankingExamples, *, repeats: int = 3, seed: int = 0
) -> Mapping[str, Interval]:
    """Per feature, what NDCG@10 on ``examples`` loses without it, with an interval clustered by user."""
    whole = ndcg10(score, examples)
    rng = np.random.default_rng(seed)
    batch = examples.batch
    counts = np.maximum((batch.candidate_item_idx != PADDING).sum(axis=1), 1)
    slots = np.arange(batch.candidate_item_idx.shape[1])
    lost = np.zeros((len(examples), len(FEATURE_NAMES)))
    for _ in range(repeats):
        other = rng.permutation(len(examples))
        place = slots % counts[other][:, None]
        for column in range(len(FEATURE_NAMES)):
            features = batch.features.copy()
            features[:, :, column] = batch.features[other[:, None], place, column]
            without = replace(examples, batch=replace(batch, features=features))
            lost[:, column] += (whole - ndcg10(score, without)) / repeats
    found = bootstrap(lost, examples.user_idx, seed=seed)
    return dict(zip(FEATURE_NAMES, found, strict=True))


def ndcg10(score: Score, examples: RankingExamples) -> Float64Array:
    """float64 [B]: of the order by ``score``."""
    starts = range(0, len(examples), _AT_ONCE)
    return examples.ndcg10(np.concatenate([score(examples.batch[at : at + _AT_ONCE]) for at in starts]))


@dataclass(frozen=True)
class Selection:
    """Which features a ranker can do without."""

    left_out: Sequence[str]
    all_ndcg10: float
    """of the ranker that reads all, on users that neither has learned from"""
    selected_ndcg10: float
    """of the one that does without :attr:`left_out`"""
    difference: Interval
    """selected less all"""

    @property
    def worse(self) -> bool:
        """Whether leaving them out costs something beyond noise."""
        return self.difference.high < 0


def worthless(importance: Mapping[str, Interval]) -> tuple[str, ...]:
    """Features that are not shown to be worth anything: their interval begins at or below zero. The retrieval score,
    on which a ranker builds, is none of them.
    """
    return tuple(name for name, each in importance.items() if each.low <= 0 and name != FEATURE_NAMES[0])
