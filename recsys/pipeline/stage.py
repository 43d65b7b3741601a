"""The stages by name, and the one protocol that all of them follow, local or remote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from recsys.types import Candidates, Query

StageName = Literal["retrieval", "ranking", "reranking"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""names of the stages, in the order in which they run"""
RETRIEVAL, RANKING, RERANKING = STAGES
NEEDS_RETRIEVAL: frozenset[str] = frozenset({RANKING})
"""stages that read retrieval's scores; popularity is no substitute for them"""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage answers, and from which Bundle."""

    candidates: Candidates
    bundle_id: str
    busy_ms: float
    """milliseconds of compute inside the stage, without queueing and transport"""


@runtime_checkable
class Stage(Protocol):
    """A plain Python object: candidates in, candidates out. It runs without Ray and holds no per-request state."""

    name: str
    bundle_id: str

    def run_batch(self, queries: Sequence[Query], candidates: Sequence[Candidates]) -> list[Candidates]:
        """One list of candidates per query, in order. The first stage is given empty candidates.

        A result must not depend on the rest of the batch.
        """
        ...


@runtime_checkable
class AsyncStage(Protocol):
    """What the runner calls: a local stage (on threads of its own or inline), or a proxy to a Serve deployment."""

    name: str

    async def run(self, query: Query, candidates: Candidates) -> StageOutput: ...
