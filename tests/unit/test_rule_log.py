"""Rules changed after a Bundle was published: the log of changes, and the Bundle that answers by them."""

import threading

import pytest
from pydantic import Field

from recsys.bundle import rule_log as rule_log_module
from recsys.bundle.live import LiveBundle, RuledBundle, Version, beneath, live_id, split_id
from recsys.bundle.location import Location
from recsys.bundle.rule_log import MAX_BYTES, RuleLog
from recsys.errors import BundleCorruptError, BundleMismatchError, ChangeConflictError, ConfigError
from recsys.pipeline.config import pipeline_config
from recsys.pipeline.rules.boost import BoostRule
from recsys.pipeline.rules.changes import plain, rule_history, state_of, unknown_names
from recsys.pipeline.rules.diversity import DiversityRule
from recsys.pipeline.rules.pin import PinRule
from serve.live.items import changes_of
from serve.live.shelf import open_bundle

BURY = {"kind": "bury", "item_ids": ["i1"]}
NOW_MS = 1_772_366_400_000  # 2026-03-01T12:00:00Z


@pytest.fixture(params=["disk", "memory"])
def log(request, tmp_path):
    where = tmp_path / "rules" if request.param == "disk" else f"memory://{tmp_path.name}/rules"
    return RuleLog(Location.of(where))


def test_a_change_is_kept_as_it_is(log):
    assert (log.version(), log.versions()) == (0, [])
    first = log.append([BURY], after=0, by="shop", note="sold out")
    second = log.append(None, after=1, by="command")
    assert (first.version, second.version, log.version()) == (1, 2, 2)
    assert log.read(1) == first
    assert log.read(2) == second
    assert (first.rules, first.by, first.note) == ((BURY,), "shop", "sold out")
    assert (second.rules, second.by, second.note) == (None, "command", None)
    assert first.at <= second.at


def test_nobody_overwrites_what_they_have_not_seen(log):
    log.append([BURY], after=0, by="a")
    for after in (0, 2):
        with pytest.raises(ChangeConflictError, match=f"at version 1, not {after}"):
            log.append([], after=after, by="b")
    assert log.versions() == [1]


def test_of_writers_at_the_same_time_one_is_first(log, monkeypatch):
    """All have seen the same version: the file decides, not the look before."""
    start = threading.Barrier(8)
    outcomes = []
    monkeypatch.setattr(RuleLog, "version", lambda self: 0)

    def write(name):
        start.wait()
        try:
            outcomes.append(log.append([BURY], after=0, by=name).by)
        except ChangeConflictError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [each for each in outcomes if each is not None]
    assert len(outcomes) == 8
    assert log.read(1).by == winner


def test_the_log_is_bounded(log, monkeypatch):
    with pytest.raises(ConfigError, match="bytes long"):
        log.append([{"kind": "bury", "item_ids": ["x" * MAX_BYTES]}], after=0, by="a")
    assert log.version() == 0
    monkeypatch.setattr(rule_log_module, "KEPT_CHANGES", 3)
    for number in range(5):
        log.append([BURY], after=number, by="a")
    assert log.versions() == [3, 4, 5]
    assert rule_history(log, (), NOW_MS, 2) is None


@pytest.mark.parametrize("note", ["x" * 1001, "\udcff"])
def test_a_note_that_cannot_be_shown_is_not_kept(log, note):
    with pytest.raises(ConfigError, match="note"):
        log.append([BURY], after=0, by="a", note=note)
    assert log.version() == 0


def test_a_change_stands_though_old_ones_cannot_be_removed(log, monkeypatch, caplog):
    def refuse(self):
        raise PermissionError("read-only")

    monkeypatch.setattr(rule_log_module, "KEPT_CHANGES", 1)
    monkeypatch.setattr(Location, "remove", refuse)
    for number in range(2):
        assert log.append([BURY], after=number, by="a").version == number + 1
    assert log.versions() == [1, 2]
    assert "old changes cannot be removed: read-only" in caplog.text


def test_only_an_empty_period_is_left_out():
    """A rule of somebody else may mean something by null."""

    class LimitRule(DiversityRule):
        limit: int | None = Field(default=5, description="of the test")

    assert plain([LimitRule(strength=0, limit=None, ends_at="2026-03-01T12:00:00Z")]) == [
        {"kind": "diversity", "strength": 0.0, "limit": None, "ends_at": "2026-03-01T12:00:00Z"}
    ]


def test_a_missing_or_broken_file_is_named(tmp_path):
    log = RuleLog(Location.of(tmp_path))
    for number in range(3):
        log.append([BURY], after=number, by="a")
    (tmp_path / "00000002.json").write_text("{")
    (tmp_path / "00000003.json").write_bytes((tmp_path / "00000001.json").read_bytes())
    for version in (2, 3, 4):
        with pytest.raises(BundleCorruptError, match=f"0000000{version}"):
            log.read(version)
    assert log.read(1).version == 1


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bundle_id", "version", "under"),
    [("abc", (0, 0), None), ("abc+3", (3, 0), "abc"), ("abc+3.2", (3, 2), "abc+3"), ("abc+0.2", (0, 2), "abc")],
)
def test_ids_name_the_bundle_and_both_versions(bundle_id, version, under):
    assert split_id(bundle_id) == ("abc", Version(*version))
    assert live_id("abc", *version) == bundle_id
    assert beneath(bundle_id) == under


# --- the Bundle -------------------------------------------------------------------------------------------------------


def new_item(bundle):
    nothing = dict.fromkeys(("description", "creator", "price", "created_at", "image"))
    return changes_of([{"item_id": "new", "title": "new", "categories": ["odd"], "available": True, **nothing}], bundle)


def test_a_bundle_answers_by_changed_rules_over_the_same_parts(store, bundles):
    bundle_id = bundles[0].bundle_id
    store.items.append(new_item(bundles[0]))
    store.rules.append([BURY], after=0, by="a")
    assert store.version() == (1, 1)
    ruled = open_bundle(str(store), f"{bundle_id}+1.1")
    assert ruled.bundle_id == f"{bundle_id}+1.1"
    assert plain(pipeline_config(ruled).rules) == [BURY | {"categories": []}]
    assert pipeline_config(ruled.base).rules == ()
    assert ruled.golden is None
    assert isinstance(ruled.base, LiveBundle)
    parts = ("catalogue", "retriever", "index", "ranker", "slates" if ruled.has("slates.arrow") else "popular")
    assert all(getattr(ruled, name)() is getattr(ruled.base, name)() for name in parts)
    # Whoever asks next shares what lies beneath, and without changes of items that is the Bundle itself.
    store.rules.append(None, after=1, by="a")
    reset = open_bundle(str(store), f"{bundle_id}+1.2")
    assert reset.base is ruled.base
    assert pipeline_config(reset) == pipeline_config(bundles[0])
    alone = open_bundle(str(store), f"{bundle_id}+0.1")
    assert alone.base is ruled.base.base
    assert alone.catalogue() is alone.base.catalogue()
    assert store.open_live(f"{bundle_id}+1.1").bundle_id == ruled.bundle_id


def test_rules_that_this_library_does_not_know_are_an_error(store, bundles):
    store.rules.append([{"kind": "from the future"}], after=0, by="a")
    ruled = RuledBundle(bundles[0], store.rules.read(1))
    with pytest.raises(BundleMismatchError, match="from the future"):
        _ = pipeline_config(ruled)


# --- what people are told ---------------------------------------------------------------------------------------------


def test_rules_and_who_changed_them_when(log):
    own = (DiversityRule(strength=0.5),)
    assert rule_history(None, own, NOW_MS) == rule_history(log, own, NOW_MS, 0)
    assert rule_history(None, own, NOW_MS, 1) is None
    timed = [
        BURY | {"starts_at": "2026-03-01T12:00:00Z"},
        BURY | {"starts_at": "2026-03-01T12:00:00.001Z"},
        BURY | {"ends_at": "2026-03-01T12:00:00Z"},
        {"kind": "from the future"},
    ]
    log.append(timed, after=0, by="a")
    log.append(None, after=1, by="b", note="never mind")
    found = rule_history(log, own, NOW_MS)
    assert (found.version, found.rules) == (2, ({"kind": "diversity", "strength": 0.5},))
    assert [(change.version, change.by, change.note) for change in found.changes] == [
        (2, "b", "never mind"), (1, "a", None)
    ]  # fmt: skip
    before = rule_history(log, own, NOW_MS, 1)
    assert before.rules == tuple(timed)
    assert before.states == ("holds", "comes", "over", "unusable")
    assert rule_history(log, own, NOW_MS, 3) is None


def test_only_the_newest_changes_are_told(log):
    for number in range(25):
        log.append([], after=number, by=str(number))
    found = rule_history(log, (), NOW_MS, 2)
    assert [change.version for change in found.changes] == list(range(25, 5, -1))
    assert (found.version, found.rules) == (2, ())


def test_a_rule_holds_from_its_start_to_before_its_end():
    tree = BURY | {"starts_at": "2026-03-01T12:00:00Z", "ends_at": "2026-03-01T12:00:01Z"}
    states = [state_of(tree, NOW_MS + offset) for offset in (-1, 0, 999, 1000)]
    assert states == ["comes", "holds", "holds", "over"]


def test_what_the_catalogue_lacks_is_named_once(bundles):
    rules = [
        PinRule(item_ids=("i1", "gone")),
        BoostRule(item_ids=("gone", "lost"), categories=("odd", "prime")),
        DiversityRule(strength=0.1),
    ]
    assert unknown_names(rules, bundles[0].catalogue()) == (["gone", "lost"], ["prime"])
