"""The command ``recsys``: what it lists, what it loads, and what it says of configuration files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs.config import JobConfig
from recsys import cli, configs
from recsys.config import annotated_yaml, load_config, parse
from recsys.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
COMMANDS = (
    *("benchmark", "bundle", "config", "demo", "events", "features"),
    *("keys", "ratings", "run", "serve", "tune", "update"),
)
MOVIELENS = ROOT / "configs/movielens_small.yaml"


def run(*words: str):
    return CliRunner().invoke(cli.app, words, prog_name="recsys")


# --- commands ---------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_loads_none_of_them() -> None:
    code = (
        "import sys; from recsys.cli import app\n"
        "try: app(['--help'], prog_name='recsys')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'pydantic', 'jobs.pipeline', 'serve.config'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    listed, loaded = done.stdout.split("loaded:")
    assert loaded.split() == []
    titles = re.findall(r"^(\S[\w ,]+):$", listed, re.MULTILINE)
    assert titles == ["Options", "Configuration", "Serve", "Train, publish and learn"]
    assert set(re.findall(r"^  ([a-z]+) ", listed.partition("Configuration:")[2], re.MULTILINE)) == set(COMMANDS)
    assert "Run the steps from interactions to a published Bundle" in listed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(name: str) -> None:
    shown = run(name, "--help")
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"Usage: recsys {name} ")
    assert len(shown.output.splitlines()) <= 60


def test_a_misspelt_command_is_told_the_nearest() -> None:
    shown = run("bundel")
    assert shown.exit_code == 2
    assert "there is no command 'bundel'; did you mean bundle?" in shown.output
    assert "there are benchmark, bundle" in run("xyz").output


def test_help_shows_the_keys_of_the_chosen_kind() -> None:
    shown = run("run", str(MOVIELENS), "train_retriever", "--help").output
    assert "\nkind: esasrec\n" in shown and "num_blocks: 2  # attention blocks" in shown
    assert "routing" not in shown and "num_candidates" not in shown  # neither other kinds nor other sections
    assert "recsys config show FILE" in run("run", "--help").output


def test_a_step_that_is_none_is_named() -> None:
    shown = run("run", str(MOVIELENS), "train_retreiver")
    assert shown.exit_code == 2
    assert "there is no step 'train_retreiver'; did you mean train_retriever?" in shown.output


# --- configuration files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_file_is_good_and_names_its_schema(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=((?:\.\./)?schema/(\w+)\.json)", first)
    assert match is not None, first
    schema = (file.parent / match[1]).read_text()
    jsonschema.validate(yaml.safe_load(file.read_text()), yaml.safe_load(schema))
    shown = run("config", "check", str(file))
    assert shown.exit_code == 0, shown.output
    assert f"a good {match[2]} configuration" in shown.output


@pytest.mark.parametrize("name", ["benchmark", "ratings", "run", "serve"])
def test_schemas_are_those_of_the_types(name: str) -> None:
    """Where this fails, ``make schemas`` writes them."""
    assert (ROOT / f"configs/schema/{name}.json").read_text() == configs.schema_text(configs.installed()[name].load())


def test_what_is_shown_is_the_same_configuration() -> None:
    config = load_config(JobConfig, MOVIELENS)
    shown = run("config", "show", str(MOVIELENS), "--set", "retriever.dim=32")
    assert shown.exit_code == 0
    assert load_config(JobConfig, MOVIELENS, overrides=["retriever.dim=32"]) == parse(
        JobConfig, yaml.safe_load(shown.output), where="test"
    )
    assert yaml.safe_load(annotated_yaml(config.retriever)) == config.retriever.model_dump(mode="json")
    below = run("config", "show", str(MOVIELENS), "retriever.train").output
    assert "\nbatch_tokens: 1024  # targets per optimizer step, over all workers\n" in below
    wrong = run("config", "show", str(MOVIELENS), "retriever.tran")
    assert (wrong.exit_code, "there is no key 'tran'; did you mean train?" in wrong.output) == (2, True)
    assert "holds 64 and no keys" in run("config", "show", str(MOVIELENS), "retriever.dim").output


def test_a_type_that_nobody_brings_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("# yaml-language-server: $schema=schema/other.json\nname: x\n")
    shown = run("config", "check", str(file))
    assert shown.exit_code == 2
    assert "no configuration is named 'other'; those are benchmark, ratings, run, serve" in shown.output


WEIGHTS = {"source": {"kind": "movielens_small"}, "positives": {"events": {"x": {"wait": 1}}}}


@pytest.mark.parametrize(
    ("changes", "where", "problem"),
    [
        ({"retriever": {"kind": "esasrec", "train": {"epoch": 3}}}, "retriever.esasrec.train.epoch", "epochs?"),
        ({"baselines": [{"kind": "item_knn", "half_lif": 3}]}, "baselines.0.item_knn.half_lif", "half_life?"),
        ({"encodr": {}}, "encodr", "encoder?"),
        ({"data": WEIGHTS}, "data.positives.events.x.wait", "weight?"),
        ({"encoder": {"model": "x", "zzz": 3}}, "encoder.zzz", "there are "),
        ({"pipeline": {"rules": [{"kind": "pinn"}]}}, "pipeline.rules.0", "there is no kind 'pinn'; did you mean pin?"),
    ],
)
def test_a_misspelt_key_is_told_the_nearest(changes: dict[str, object], where: str, problem: str) -> None:
    tree = {"name": "a", "data": {"source": {"kind": "movielens_small"}}}
    with pytest.raises(ConfigError) as told:
        parse(JobConfig, tree | changes, where="test")
    (line,) = (each for each in str(told.value).splitlines() if each.startswith(f"  {where}: "))
    assert problem in line
