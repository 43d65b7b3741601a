"""Canaries in the pointer of a store, and the commands that move it."""

import re

import pytest
from typer.testing import CliRunner

from jobs import publish
from jobs.store import app
from recsys.bundle.store import BundleStore
from recsys.config import to_yaml
from recsys.errors import BundleError


def test_canaries_in_the_pointer(store, bundles):
    first, second, third = (bundle.bundle_id for bundle in bundles)
    with pytest.raises(BundleError, match="current already"):
        store.start_canary(first, 0.5)
    with pytest.raises(BundleError, match="there is no canary"):
        store.promote()
    with pytest.raises(BundleError, match="there is no canary"):
        store.withdraw()
    pointer = store.start_canary(second, 0.5)
    assert pointer.wanted == (first, second)
    with pytest.raises(BundleError, match="is the canary, not"):
        store.withdraw(third)
    assert set(store.collect(keep=1)) <= {third}  # whichever is newest stays, and never one that is pointed to
    pointer = store.promote(reason="better")
    assert (pointer.bundle_id, pointer.previous, pointer.canary) == (second, first, None)
    assert store.rollback().bundle_id == first


def test_what_is_activated_again_keeps_what_was_before_it(store, bundles):
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    store.activate(second, first)
    assert store.activate(second, second).previous == first
    assert store.rollback().bundle_id == first


def test_activating_ends_a_canary_and_says_so(store, bundles):
    first, second, third = (bundle.bundle_id for bundle in bundles)
    store.start_canary(second, 0.1)
    pointer = store.activate(third, first)
    assert pointer.canary is None
    assert pointer.reason == f"the canary {second} ended when {third} was activated"


def test_store_commands(store, bundles):
    first, second, third = (bundle.bundle_id for bundle in bundles)
    where = ["--store", str(store)]

    def run(*words):
        return CliRunner().invoke(app, [*words, *where])

    listed = run("list").stdout
    assert all(bundle.bundle_id in listed for bundle in bundles)
    assert listed.count("current") == 1
    assert f"current is {second}" in run("activate", second[:12]).stdout
    assert f"current is {first}" in run("rollback").stdout
    assert f"20.0% of the users get the canary {third}" in run("canary", third, "--share", "20").stdout
    assert "canary, 20.0%" in run("list").stdout
    assert f"current is {first}\n" in run("withdraw", "--reason", "no").stdout
    run("canary", third)
    assert f"current is {third}\n" in run("promote").stdout
    failed = run("activate", "no such id")
    assert failed.exit_code == 2
    assert "0 Bundles have an id" in failed.stderr
    assert run("promote").exit_code == 2
    assert store.past() == [third, first, second]
    kept = store.list()[0].bundle_id == second  # whichever is newest stays
    assert run("collect", "--keep", "1").stdout == ("" if kept else f"removed {second}\n")


def test_rules_commands(store, tmp_path):
    where = ["--store", str(store)]
    file = tmp_path / "rules.yaml"

    def run(*words):
        return CliRunner().invoke(app, ["rules", *words, *where])

    nothing = run("show")
    assert (nothing.stdout, nothing.stderr) == ("[]\n", "version 0: no rules\n")
    file.write_text(
        "- {kind: pin, item_ids: [i1, gone], ends_at: 2026-01-01T00:00:00Z}\n- {kind: bury, categories: [odd, prime]}\n"
    )
    made = run("set", str(file), "--note", "sold out")
    assert re.fullmatch(r"version 1, .+, by command \(.+\): 2 rules: sold out\n", made.stdout)
    assert "items that the catalogue lacks, and that are ignored: gone\n" in made.stderr
    assert "categories that the catalogue lacks, and that are ignored: prime\n" in made.stderr
    change = store.rules.read(1)
    assert (change.by[:9], change.note, change.rules[0]["ends_at"]) == ("command (", "sold out", "2026-01-01T00:00:00Z")

    shown = run("show")
    assert "version 1: pin over, bury holds\n" in shown.stderr
    file.write_text(shown.stdout)  # what is shown can be set
    made = run("set", str(file), "--after", "1")
    assert [line[:9] for line in made.stdout.splitlines()] == ["version 2", "after ver"]
    assert store.rules.read(2).rules == change.rules
    refused = run("set", str(file), "--after", "1")
    assert refused.exit_code == 2
    assert "at version 2, not 1" in refused.stderr

    assert "the Bundle's own rules" in run("reset").stdout
    assert store.rules.read(3).rules is None
    assert run("show").stdout == "[]\n"
    assert run("show", "--version", "1").stdout == shown.stdout
    assert "no version 4" in run("show", "--version", "4").stderr

    for wrong, problem in (
        ("kind: pin", "a list of rules"),
        ("- kind: pinn", "pinn"),
        ("[", "not valid YAML"),
        ("", "a list of rules"),
    ):
        file.write_text(wrong)
        refused = run("set", str(file))
        assert refused.exit_code == 2
        assert problem in refused.stderr
    assert store.rules.version() == 3


def test_rules_of_what_is_no_store_are_refused_and_nothing_is_written(store, tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("[]")
    bundle = store.open()
    for where in (bundle.path, tmp_path / "no such store"):
        for words in (("set", str(file)), ("reset",)):
            refused = CliRunner().invoke(app, ["rules", *words, "--store", str(where)])
            assert refused.exit_code == 2
            assert f"{where}: no store of Bundles" in refused.stderr
        assert not (where / "rules").exists()
    bundle.manifest.check_files(bundle.path)


def test_publishing_moves_the_pointer_when_told_and_back(trained_job, tmp_path):
    """The steps before are complete: only Bundles are made, and the second call with the same settings makes none."""
    file = tmp_path / "run.yaml"
    settings = trained_job.publish.model_copy(update={"store": str(tmp_path / "store"), "activate": False})
    file.write_text(to_yaml(trained_job.model_copy(update={"publish": settings})))
    store = BundleStore(tmp_path / "store")

    def run(*words):
        result = CliRunner().invoke(publish.app, ["--config", str(file), *words])
        pointer = store.current()
        return result, None if pointer is None else pointer.bundle_id

    assert run()[1] is None
    _, first = run("--activate")
    assert [manifest.bundle_id for manifest in store.list()] == [first]
    _, second = run("--activate", "--set", "num_popular=7")
    assert second != first
    result, current = run("--rollback")
    assert (result.stdout, current) == (f"current is {first}\n", first)
    refused, current = run("--rollback", "--activate")
    assert (refused.exit_code, current) == (2, first)
    assert "exclude each other" in refused.stderr


def test_errors_are_shown_as_they_are(tmp_path):
    """Nothing in them is taken for markup, and no line is broken."""
    file = tmp_path / "[red]a file with a long name[/nothing]" / f"{'x' * 100}.yaml"
    refused = CliRunner().invoke(publish.app, ["--config", str(file)])
    assert (refused.exit_code, refused.stderr) == (2, f"ConfigError: {file}: no such configuration file\n")
