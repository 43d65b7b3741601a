"""When a Bundle on trial is worse than the one that all others get."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from recsys.config import StrictConfig


class CanaryConfig(StrictConfig):
    """What a Bundle on trial may do worse than the current one before the trial is ended. Judged by every gateway."""

    min_answers: int = Field(default=200, ge=1, le=1_000_000, description="answers of it before it is judged")
    max_failed_share: float = Field(default=0.005, ge=0, le=1, description="share that fails beyond the current one's")
    max_degraded_share: float = Field(
        default=0.02, ge=0, le=1, description="share that is degraded beyond the current one's"
    )
    max_latency_ratio: float = Field(default=1.5, ge=1, le=100, description="p95 over the current one's")
    min_latency_ms: float = Field(default=20.0, ge=0, le=60_000, description="a p95 up to this is never too slow (ms)")


@dataclass
class Tally:
    """How one Bundle has answered lately."""

    num_answers: int = 0
    """those that failed included"""
    num_failed: int = 0
    num_degraded: int = 0
    took_ms: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def answered(self, took_ms: float, *, degraded: bool) -> None:
        self.num_answers += 1
        self.num_degraded += degraded
        self.took_ms.append(took_ms)

    def failed(self) -> None:
        self.num_answers += 1
        self.num_failed += 1

    @property
    def failed_share(self) -> float:
        return self.num_failed / max(1, self.num_answers)

    @property
    def degraded_share(self) -> float:
        return self.num_degraded / max(1, self.num_answers)

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.took_ms, 95)) if self.took_ms else 0.0


def worse(trial: Tally, current: Tally, limits: CanaryConfig) -> str | None:
    """Why ``trial`` is worse than ``current``, in words; None where it is not, or too little is known yet."""
    if trial.num_answers < limits.min_answers:
        return None
    if trial.failed_share > current.failed_share + limits.max_failed_share:
        return f"{trial.failed_share:.1%} of its answers fail, {current.failed_share:.1%} otherwise"
    if trial.degraded_share > current.degraded_share + limits.max_degraded_share:
        return f"{trial.degraded_share:.1%} of its answers are degraded, {current.degraded_share:.1%} otherwise"
    if len(current.took_ms) >= limits.min_answers:
        allowed_ms = max(limits.min_latency_ms, limits.max_latency_ratio * current.p95_ms)
        if trial.p95_ms > allowed_ms:
            return f"its p95 is {trial.p95_ms:.1f} ms, {current.p95_ms:.1f} ms otherwise"
    return None
