"""All steps in order, as one job: ``python -m jobs.pipeline --config configs/NAME.yaml``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs._ray import ray_session
from jobs.artifacts import Artifact
from jobs.config import JobConfig
from jobs.steps import embed, evaluate, prepare, publish, recommend, train_encoder, train_ranker, train_retriever
from recsys.errors import ConfigError

console = Console(stderr=True)


def run(config: JobConfig, until: str = "pipeline") -> dict[str, Artifact]:
    """Run the steps up to ``until`` (a job module's name); those that are complete are reused."""
    left_out = {"train_encoder": config.encoder is None, "embed": config.encoder is None}
    if (left_out | {"recommend": not config.slates.top_k}).get(until):
        raise ConfigError(f"the step {until} has nothing to do: this configuration leaves it out")
    if "working_dir_files" in (home := Path(config.workdir).absolute()).parts:
        advice = (
            "is inside Ray's copy of the submitted folder, which Ray deletes: give one that stays, --set workdir=FOLDER"
        )
        console.print(f"[yellow]{home} {advice}[/yellow]", soft_wrap=True)
    done: dict[str, Artifact] = {}
    started = time.perf_counter()

    def finish(name: str, artifact: Artifact) -> bool:
        done[name] = artifact
        state = "reused" if artifact.reused else f"done in {artifact.seconds:.1f} s"
        console.print(f"[bold]{name}[/bold] {state}  [dim]{artifact.path}[/dim]", highlight=False, soft_wrap=True)
        return name == until

    with ray_session() if config.compute.num_workers else nullcontext():
        for name, artifact in _steps(config):
            if finish(name, artifact):
                break
    if "publish" in done:
        published = done["publish"].metrics
        console.print(
            f"Bundle {published['bundle_id']} in {Path(published['store']).absolute()}", highlight=False, soft_wrap=True
        )
    table = Table(title=f"{config.name}: {time.perf_counter() - started:.1f} s", show_edge=False)
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("artefact")
    for name, artifact in done.items():
        seconds = "reused" if artifact.reused else f"{artifact.seconds:.1f}"
        table.add_row(name, seconds, f"{artifact.step}/{artifact.key}")
    console.print(table)
    return done


def _steps(config: JobConfig):
    prepared = prepare.run(config)
    yield "prepare", prepared
    embedded = encoder = None
    if config.encoder is not None:
        encoder = train_encoder.run(config, prepared)
        yield "train_encoder", encoder
        embedded = embed.run(config, prepared, encoder)
        yield "embed", embedded
    retriever = train_retriever.run(config, prepared, embedded)
    yield "train_retriever", retriever
    ranker = train_ranker.run(config, prepared, embedded, retriever)
    yield "train_ranker", ranker
    judged = evaluate.run(config, prepared, retriever, ranker)
    yield "evaluate", judged
    slates = None
    if config.slates.top_k:
        slates = recommend.run(config, prepared, retriever, ranker)
        yield "recommend", slates
    yield "publish", publish.run(config, prepared, encoder, embedded, retriever, ranker, judged, slates)


if __name__ == "__main__":
    from jobs.cli import main

    main("pipeline")
