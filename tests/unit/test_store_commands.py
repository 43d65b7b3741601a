"""Canaries in the pointer of a store, and the commands that move it."""

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
