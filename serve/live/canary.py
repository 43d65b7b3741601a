"""When a canary is worse than the Bundle that all others get."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from serve.config import CanaryLimits

_NUM_KEPT = 2000
_STANDARD_ERRORS = 3.0
"""a difference of shares must be so many of them, or it may be chance: gateways judge every second"""


@dataclass
class Tally:
    """How one Bundle has answered known users lately."""

    answers: deque[tuple[bool, bool, float]] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    """failed, degraded, milliseconds"""

    def answered(self, took_ms: float, *, degraded: bool) -> None:
        self.answers.append((False, degraded, took_ms))

    def failed(self) -> None:
        self.answers.append((True, False, 0.0))

    def __len__(self) -> int:
        return len(self.answers)

    def share(self, column: int) -> float:
        """Of the answers, 0 failed or 1 degraded."""
        return sum(answer[column] for answer in self.answers) / max(1, len(self))

    @property
    def p95_ms(self) -> float:
        """Of the answers that did not fail; 0 without any."""
        took_ms = [took_ms for failed, _, took_ms in self.answers if not failed]
        return float(np.percentile(took_ms, 95)) if took_ms else 0.0


def worse(canary: Tally, current: Tally, limits: CanaryLimits) -> str | None:
    """Why ``canary`` is worse than ``current``, in words; None where it is not, or too little is known yet."""
    if len(canary) < limits.min_answers:
        return None
    for column, allowed, words in (
        (0, limits.max_failed_share, "fail"),
        (1, limits.max_degraded_share, "are degraded"),
    ):
        mine, others = canary.share(column), current.share(column)
        pooled = (mine * len(canary) + others * len(current)) / (len(canary) + len(current))
        error = math.sqrt(pooled * (1 - pooled) * (1 / len(canary) + 1 / max(1, len(current))))
        if mine > others + max(allowed, _STANDARD_ERRORS * error):
            return f"{mine:.1%} of its answers {words}, {others:.1%} otherwise"
    if len(current) >= limits.min_answers:
        allowed_ms = max(limits.min_latency_ms, limits.max_latency_ratio * current.p95_ms)
        if canary.p95_ms > allowed_ms:
            return f"its p95 is {canary.p95_ms:.1f} ms, {current.p95_ms:.1f} ms otherwise"
    return None
