"""What a step is: an object that says what it reads, so that the order in which steps run follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from jobs.artifacts import Artifact
from jobs.config import JobConfig
from recsys.errors import ConfigError

ArtifactT = TypeVar("ArtifactT", bound=Artifact)


@dataclass(frozen=True, eq=False)
class Step(Generic[ArtifactT]):
    """One step: a module of this folder defines it as ``STEP``, and ``python -m jobs.NAME`` runs it."""

    name: str
    """that of its module"""
    help: str
    """one line"""
    leaves: type[ArtifactT]
    run: Callable[..., ArtifactT]
    """called with the configuration and what the steps of ``reads`` left, in that order; None for one left out"""
    reads: tuple[Step[Any], ...] = ()
    section: str | None = None
    """of the configuration, that is its own"""
    left_out: Callable[[JobConfig], bool] = lambda _: False
    """whether a configuration has nothing for it to do"""

    def build(
        self,
        config: JobConfig,
        settings: object,
        read: Sequence[Artifact | None],
        make: Callable[[Path], dict[str, Any]],
    ) -> ArtifactT:
        """Its artefact, found or made, see :meth:`~jobs.artifacts.Artifact.build`; a trained model is named as such."""
        parents = [each for each in read if each is not None]
        return self.leaves.build(config.workdir, self.name.removeprefix("train_"), settings, parents, make)

    def order(self) -> list[Step[Any]]:
        """Every step that it needs, each after what that one reads, and itself at the end."""
        before = [step for read in self.reads for step in read.order()]
        return [*dict.fromkeys(before), self]


class Results:
    """What steps left, by step."""

    def __init__(self) -> None:
        self._left: dict[Step[Any], Artifact] = {}

    @classmethod
    def of(cls, config: JobConfig, *wanted: Step[Any]) -> Results:
        """Those of ``wanted``, and of all that they read."""
        results = cls()
        for step in plan(config, *wanted):
            results.run(config, step)
        return results

    def run(self, config: JobConfig, step: Step[ArtifactT]) -> ArtifactT:
        """Run a step whose turn it is."""
        left = step.run(config, *map(self.get, step.reads))
        self._left[step] = left
        return left

    def __getitem__(self, step: Step[ArtifactT]) -> ArtifactT:
        return cast(ArtifactT, self._left[step])

    def get(self, step: Step[ArtifactT]) -> ArtifactT | None:
        """None for a step that did not run."""
        return self[step] if step in self._left else None

    def __iter__(self) -> Iterator[tuple[Step[Any], Artifact]]:
        """In the order in which they ran."""
        return iter(self._left.items())


def plan(config: JobConfig, *wanted: Step[Any]) -> list[Step[Any]]:
    """``wanted`` and every step that they need, in an order in which they can run, without those left out.

    :raises ConfigError: when ``config`` leaves out one of ``wanted``.
    """
    if idle := [step.name for step in wanted if step.left_out(config)]:
        raise ConfigError(f"the step {idle[0]} has nothing to do: this configuration leaves it out")
    steps = dict.fromkeys(step for one in wanted for step in one.order())
    return [step for step in steps if not step.left_out(config)]
