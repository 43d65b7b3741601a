"""Whether updated models may take over: judged beside the parent, as both are served, on events new to both.

Prequential (test, then train; Gama et al., Machine Learning 90(3), 2013): the newest slice judges first, and only then
is learned. The child must not be worse than the parent beyond noise, must not have drifted away from it, and must not
promise more than it keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recsys.data.dataset import Dataset, Split, Targets
from recsys.evaluation.protocol import EvaluationConfig, RankFn, evaluate_ranker, sample_queries
from recsys.evaluation.significance import paired_difference
from recsys.models.base import Retriever, VectorRetriever
from recsys.online.config import GateConfig
from recsys.types import Float64Array, Int32Array

_CALIBRATION_QUERIES = 512
_TOP = 10
_MAX_SCORES = 1 << 23
"""scores held at once"""


@dataclass(frozen=True)
class Verdict:
    """What the gate found."""

    passed: bool
    reasons: tuple[str, ...]
    """why it did not pass"""
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Contestant:
    """Models as they are served."""

    rank: RankFn
    retriever: Retriever


def judge(
    parent: Contestant, child: Contestant, dataset: Dataset, evaluation: EvaluationConfig, gate: GateConfig
) -> Verdict:
    """Judge ``child`` on ``TEST``."""
    if (verdict := unsettled(dataset, gate)) is not None:
        return verdict
    targets = dataset.targets(Split.TEST)
    evaluation = evaluation.model_copy(update={"max_queries": gate.max_queries})
    metric = evaluation.main_metric
    values: list[Float64Array] = []
    user_idx = np.zeros(0, np.int32)
    for name, one in (("parent", parent), ("child", child)):
        view = evaluate_ranker(name, one.rank, targets, dataset, evaluation).views[0].segments["all"]
        values.append(view.values[metric])
        user_idx = view.user_idx
    (difference,) = paired_difference(values[1][:, None], values[0][:, None], user_idx, **evaluation.resampling)
    asked = targets.select(sample_queries(targets, evaluation))
    sample = asked[: min(len(asked), _CALIBRATION_QUERIES)]
    overlap = _overlap(parent.rank(sample), child.rank(sample))
    before, after = float(values[0].mean()), float(values[1].mean())
    figures: dict[str, Any] = {
        "num_queries": len(values[0]),
        "metric": metric,
        "parent": before,
        "child": after,
        "difference": [difference.mean, difference.low, difference.high],
        "overlap@10": overlap,
    }
    reasons: list[str] = []
    if difference.high < 0:
        reasons.append(f"worse than the parent beyond noise: {metric} {after:.4f} after {before:.4f}")
    elif difference.mean < -gate.max_loss * before:
        reasons.append(f"{metric} {after:.4f} after {before:.4f}: more is lost than {gate.max_loss:.0%}")
    if overlap < gate.min_overlap:
        reasons.append(
            f"drift: {overlap:.0%} of the ten best items are those of the parent, not {gate.min_overlap:.0%}"
        )
    if isinstance(parent.retriever, VectorRetriever) and isinstance(child.retriever, VectorRetriever):
        errors = [_miscalibration(each.retriever, sample) for each in (parent, child)]
        figures["miscalibration"] = errors
        if errors[1] > errors[0] * gate.max_miscalibration + np.log(gate.max_miscalibration):
            reasons.append(
                f"calibration: what the child promises is a factor {np.exp(errors[1]):.1f} from what it keeps, the "
                f"parent's {np.exp(errors[0]):.1f}"
            )
    return Verdict(not reasons, tuple(reasons), figures)


def unsettled(dataset: Dataset, gate: GateConfig) -> Verdict | None:
    """The verdict where there are too few events to judge by, before anything is learned; else None."""
    number = len(dataset.targets(Split.TEST))
    if number >= gate.min_queries:
        return None
    why = f"{number} new events to judge by, fewer than {gate.min_queries}: nothing is settled yet"
    return Verdict(False, (why,), {"num_queries": number})


def _overlap(a: Int32Array, b: Int32Array) -> float:
    """The mean share of the ten best that two rankings, int32 [B, K], have in common."""
    a, b = a[:, :_TOP], b[:, :_TOP]
    same = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
    return float((same.any(axis=2).sum(axis=1) / np.maximum((a >= 0).sum(axis=1), 1)).mean())


def _miscalibration(retriever: Retriever, targets: Targets) -> float:
    """How far the share of targets among the ten best is from what the softmax of the scores promises: the absolute
    logarithm of their ratio, each with half a hit added.
    """
    promised, kept = 0.0, 0
    size = max(1, _MAX_SCORES // retriever.num_items)
    for first in range(0, len(targets), size):
        batch = targets[first : first + size]
        scores_BN = retriever.score(batch.histories, batch.now_ms).astype(np.float64)
        chance_BN = np.exp(scores_BN - scores_BN.max(axis=1, keepdims=True))
        chance_BN /= chance_BN.sum(axis=1, keepdims=True)
        best_Bk = np.argpartition(-scores_BN, min(_TOP, scores_BN.shape[1] - 1), axis=1)[:, :_TOP]
        promised += float(np.take_along_axis(chance_BN, best_Bk, axis=1).sum())
        kept += sum(bool(np.isin(batch.relevant(row), best_Bk[row]).any()) for row in range(len(batch)))
    return float(abs(np.log((promised + 0.5) / (kept + 0.5))))
