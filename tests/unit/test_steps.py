"""Steps: what each reads gives the order, and one more of them is one more file."""

import inspect
import runpy
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

import jobs.steps
from jobs.artifacts import Artifact
from jobs.config import JobConfig
from jobs.steps import embed, evaluate, prepare, publish, recommend, train_encoder, train_ranker, train_retriever
from jobs.steps.base import Results, Step, plan
from recsys.config import load_config
from recsys.errors import ConfigError
from recsys.files import read_json

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/synthetic.yaml"
SMALL = ["compute.num_workers=0", "data.source.num_users=60", "data.source.num_items=40"]
NAMES = sorted(path.stem for path in (ROOT / "jobs/steps").glob("[!_]*.py") if path.stem != "base")


def config(workdir, *more):
    return load_config(JobConfig, CONFIG, overrides=[f"workdir={workdir}", *SMALL, *more])


def names(steps):
    return [step.name for step in steps]


def test_the_order_follows_from_what_steps_read(tmp_path):
    everything = publish.STEP.order()
    assert sorted(names(everything)) == NAMES
    assert everything == [
        prepare.STEP,
        train_encoder.STEP,
        embed.STEP,
        train_retriever.STEP,
        train_ranker.STEP,
        evaluate.STEP,
        recommend.STEP,
        publish.STEP,
    ]
    with_text = config(tmp_path, "encoder.model=some/folder")
    assert plan(with_text, publish.STEP) == everything
    assert plan(with_text, embed.STEP) == everything[:3]


def test_what_a_configuration_leaves_out_does_not_run(tmp_path):
    lean = config(tmp_path, "slates.top_k=0")
    assert names(plan(lean, publish.STEP)) == ["prepare", "train_retriever", "train_ranker", "evaluate", "publish"]
    for step in (train_encoder.STEP, embed.STEP, recommend.STEP):
        with pytest.raises(ConfigError, match=f"the step {step.name} has nothing to do"):
            plan(lean, step)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_given_what_it_reads(name):
    """By position, so the types of its parameters must be those of what it reads; None for what may be left out."""
    step = import_module(f"jobs.steps.{name}").STEP
    assert (step.name, step.section in JobConfig.model_fields) == (name, True)
    types = typing.get_type_hints(step.run)
    assert types.pop("return") is step.leaves
    there = {Step("any", "", Artifact, run=list).left_out, step.left_out}  # whenever the step itself is
    given = [each.leaves if each.left_out in there else each.leaves | None for each in step.reads]
    assert [types[parameter] for parameter in inspect.signature(step.run).parameters] == [JobConfig, *given]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_a_command_that_an_import_does_not_run(name):
    import_module(f"jobs.{name}")


TOY = """
from jobs.artifacts import Artifact
from jobs.steps import embed, prepare
from jobs.steps.base import Step

def run(config, prepared, embedded):
    def make(folder):
        assert embedded is None
        return {"counted": prepared.dataset().num_users, "as_told": prepared.num_users}

    return STEP.build(config, {"top_k": config.slates.top_k}, (prepared, embedded), make)

STEP = Step("toy", "Count users.", Artifact, run, reads=(prepare.STEP, embed.STEP), section="slates")
"""
ENTRY = """
from jobs.pipeline import main

main("toy", __name__)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Calls the command of a step that lies outside of the tree; its exit status."""
    for package, code in ((jobs, ENTRY), (jobs.steps, TOY)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "toy.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["jobs.toy", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("jobs.toy", run_name="__main__", alter_sys=True)
        return end.value.code

    yield call
    sys.modules.pop("jobs.steps.toy", None)


def test_one_more_step_runs_with_those_that_it_reads(toy, tmp_path, capsys):
    words = ["--config", str(CONFIG)]
    for override in (f"workdir={tmp_path / 'runs'}", *SMALL, "top_k=3"):  # the last in the step's own section
        words += ["--set", override]
    assert toy(*words) == 0
    said = capsys.readouterr().err
    assert "prepare done" in said and "toy done" in said and "train_retriever" not in said
    (record,) = (read_json(path) for path in tmp_path.glob("runs/toy/*/artifact.json"))
    assert record["metrics"] == {"counted": 60, "as_told": 60}
    assert record["config"] == {"top_k": 3}
    assert [parent["step"] for parent in record["parents"]] == ["prepare"]
    assert toy(*words) == 0
    said = capsys.readouterr().err
    assert "prepare reused" in said and "toy reused" in said
    assert toy("--help") == 0
    said = capsys.readouterr().out
    assert "Count users." in said and "recsys config show FILE slates" in said


def test_results_are_found_by_step(tmp_path):
    done = Results.of(config(tmp_path), prepare.STEP)
    assert done[prepare.STEP].dataset().num_users == 60
    assert done.get(embed.STEP) is None
    with pytest.raises(KeyError):
        done[embed.STEP]
    assert [(step.name, left.reused) for step, left in done] == [("prepare", False)]


def test_a_trained_model_is_named_without_its_training(tmp_path):
    kept = train_encoder.STEP.build(config(tmp_path), {}, (None,), lambda _: {})
    assert kept.path.parent == tmp_path / "encoder"
    assert isinstance(kept, train_encoder.STEP.leaves)
