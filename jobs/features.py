"""Measure what each feature is worth to the ranker, and which of them it can do without.

Trains what ``--config`` says as far as the ranker (finished steps are reused); judges on the users that decide when its
training stops, from whom it does not learn otherwise. The features that are not shown to be worth anything are left out
together, the ranker is trained once more without them, and both are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs import cli, pipeline
from jobs.artifacts import Artifact
from jobs.config import JobConfig
from jobs.steps import embed, prepare, train_ranker, train_retriever
from recsys.cli import command, readable_errors
from recsys.errors import ConfigError
from recsys.evaluation.importance import Selection, ndcg10, permutation_importance, worthless
from recsys.evaluation.significance import Interval, bootstrap
from recsys.files import write_json
from recsys.models.rankers.attention import AttentionRankerConfig

console = Console(stderr=True, markup=False)


def run(config: JobConfig) -> Artifact:
    """The artefact of this job: ``features.json`` and ``features.md``.

    :raises ConfigError: for a ranker that reads words instead of features.
    """
    model = config.ranking.model
    if not isinstance(model, AttentionRankerConfig):
        raise ConfigError(f"ranking.model of kind {model.kind} reads texts, not features")
    done = pipeline.run(config, train_ranker.STEP)
    prepared, embedded, retriever = done[prepare.STEP], done.get(embed.STEP), done[train_retriever.STEP]

    def make(folder: Path) -> dict[str, Any]:
        lesson = train_ranker.learned_from(config, prepared, embedded, retriever)
        runtime = config.compute.runtime()

        def fitted(left_out: tuple[str, ...]):
            one = model.model_copy(update={"left_out": tuple(sorted({*model.left_out, *left_out}))})
            return one.fit(lesson.train, lesson.catalogue, runtime, holdout=lesson.holdout, seed=config.seed)

        whole = fitted(())
        importance = permutation_importance(whole.score, lesson.holdout, seed=config.seed)
        left_out = worthless(importance)
        without = fitted(left_out)
        before, after = ndcg10(whole.score, lesson.holdout), ndcg10(without.score, lesson.holdout)
        (difference,) = bootstrap((after - before)[:, None], lesson.holdout.user_idx, seed=config.seed)
        selection = Selection(left_out, float(before.mean()), float(after.mean()), difference)
        record = {
            "importance": {name: vars(each) for name, each in importance.items()},
            "left_out": list(left_out),
            "ndcg@10": {"all": selection.all_ndcg10, "selected": selection.selected_ndcg10},
            "difference": vars(difference),
            "num_queries": len(lesson.holdout),
        }
        write_json(folder / "features.json", record)
        (folder / "features.md").write_text(markdown(importance, selection))
        show(importance, selection, len(lesson.holdout))
        return record

    settings = train_ranker.settings_of(config)
    parents = [each for each in (prepared, embedded, retriever) if each is not None]
    return Artifact.build(config.workdir, "features", settings, parents, make)


def rows(importance: dict[str, Interval] | Any, selection: Selection) -> list[tuple[str, str, str, str]]:
    """Name, loss, interval and what becomes of it, the most worth first."""
    ordered = sorted(importance.items(), key=lambda pair: -pair[1].mean)
    return [
        (
            name,
            f"{each.mean:+.5f}",
            f"{each.low:+.5f} to {each.high:+.5f}",
            "" if name not in selection.left_out else "no",
        )
        for name, each in ordered
    ]


def show(importance: Any, selection: Selection, num_queries: int) -> None:
    """The table for people."""
    table = Table(title=f"what NDCG@10 loses without a feature, {num_queries} queries", show_edge=False)
    for column in ("feature", "loss", "95 %", "worth"):
        table.add_column(column, justify="left" if column in {"feature", "worth"} else "right")
    for row in rows(importance, selection):
        table.add_row(*row)
    console.print(table)
    console.print(advice(selection), highlight=False, soft_wrap=True)


def advice(selection: Selection) -> str:
    """One sentence."""
    if not selection.left_out:
        return "every feature is worth something: keep them all"
    names = ", ".join(selection.left_out)
    found = f"NDCG@10 {selection.selected_ndcg10:.4f} without them, {selection.all_ndcg10:.4f} with all"
    if selection.worse:
        return f"none can be left out: together they matter ({found}): {names}"
    return f"{found}; to leave them out: --set 'ranking.model.left_out=[{names}]'"


def markdown(importance: Any, selection: Selection) -> str:
    """The table for a file."""
    lines = ["| feature | loss of NDCG@10 | 95 % | worth |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(importance, selection)]
    return "\n".join([*lines, "", advice(selection), ""])


def main(config: cli.ConfigPath, set_: cli.Overrides = None) -> None:
    """What each feature is worth to the ranker, and which of them it can do without."""
    with readable_errors():
        artifact = run(cli.read(config, set_, train_ranker.STEP.section))
    console.print(f"{artifact.path}/features.md", highlight=False, soft_wrap=True)


app = command(main)

if __name__ == "__main__":
    app()
