"""One Bundle takes over from another: what answers when, what is refused, what is let go."""

import asyncio
import gc
import weakref

import pytest

from recsys.errors import BundleError, StageError
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.pipeline.requests import RecommendRequest
from serve.config import CanaryLimits, OpenAccess, ServeConfig
from serve.live import shelf as shelf_module
from serve.live import switch as switch_module
from serve.live.canary import Tally, worse
from serve.live.shelf import Shelf, StageInfo
from serve.live.switch import Switch


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(switch_module, "_LINGER_S", 0.0)
    monkeypatch.setattr(switch_module, "_PAUSE_S", 0.0)


@pytest.fixture
async def opened(store, tmp_path):
    """A switch with all stages in process, and its service."""
    config = ServeConfig(
        bundle_uri=str(store),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
        canary=CanaryLimits(min_answers=20),
    )
    switch = Switch(config, config.event_store.open(), {})
    service = await switch.start()
    yield switch, service
    service.close()


def break_golden(store, bundle, monkeypatch):
    """From now on this Bundle answers its golden query wrongly."""
    real = switch_module.open_bundle

    def opened(uri, bundle_id):
        found = real(uri, bundle_id)
        if bundle_id == bundle.bundle_id:
            golden = found.golden
            found._parts["golden.json"] = golden.model_copy(update={"scores": tuple(s + 1 for s in golden.scores)})
        return found

    monkeypatch.setattr(switch_module, "open_bundle", opened)


async def turn(switch, service, times=1):
    """What a gateway does every second."""
    for _ in range(times):
        await switch.step(service)
        await switch.tidy(service)
        await asyncio.sleep(0.01)


async def test_the_pointer_is_followed(opened, store, bundles):
    switch, service = opened
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    assert service.current.bundle_id == first
    await switch.step(service)
    assert service.current.bundle_id == first
    store.activate(second, first)
    await switch.step(service)
    assert service.current.bundle_id == second
    assert service.current.proven
    assert (await service.recommend(RecommendRequest()))[0].bundle_id == second
    store.rollback()
    await switch.step(service)
    assert service.current.bundle_id == first


async def test_a_request_keeps_its_bundle_and_its_bundle_stays(opened, store, bundles, monkeypatch):
    switch, service = opened
    before = service.current
    release = asyncio.Event()
    arecommend = before.recommender.arecommend

    async def held(request, **fields):
        await release.wait()
        return await arecommend(request, **fields)

    monkeypatch.setattr(before.recommender, "arecommend", held)
    waiting = asyncio.create_task(service.recommend(RecommendRequest()))
    await asyncio.sleep(0)
    store.activate(bundles[1].bundle_id, bundles[0].bundle_id)
    await turn(switch, service, 3)
    assert service.retired == [before]
    assert (await service.recommend(RecommendRequest()))[0].bundle_id == bundles[1].bundle_id
    release.set()
    answer, generation = await waiting
    assert answer.bundle_id == bundles[0].bundle_id
    assert answer.degraded == ()
    assert generation is before
    await turn(switch, service, 2)
    assert service.retired == []


async def test_what_is_returned_to_is_not_let_go_meanwhile(opened, store, bundles, monkeypatch):
    """A rollback while the Bundle before is still open: tidying up runs beside the look at the store."""
    switch, service = opened
    first, second = bundles[0].bundle_id, bundles[1].bundle_id
    store.activate(second, first)
    await switch.step(service)
    assert [each.bundle_id for each in service.retired] == [first]
    store.rollback()
    still = switch._still

    async def slow(*given):
        for _ in range(3):
            await switch.tidy(service)
            await asyncio.sleep(0.01)
        return await still(*given)

    monkeypatch.setattr(switch, "_still", slow)
    await switch.step(service)
    assert service.current.bundle_id == first
    answer, _ = await service.recommend(RecommendRequest())
    assert (answer.bundle_id, answer.degraded) == (first, ())
    monkeypatch.setattr(switch, "_still", still)
    await turn(switch, service, 3)
    assert service.retired == []


async def test_what_is_let_go_leaves_the_memory(opened, store, bundles):
    switch, service = opened
    gone = weakref.ref(service.current.recommender.runner.stages[0].stage)
    store.activate(bundles[1].bundle_id, bundles[0].bundle_id)
    gc.disable()  # what is in a circle would stay until somebody looks for it
    try:
        await turn(switch, service, 3)
        assert gone() is None
    finally:
        gc.enable()


async def test_a_bad_bundle_is_refused_and_the_old_one_stays(opened, store, bundles, monkeypatch, caplog):
    switch, service = opened
    first, second, third = (bundle.bundle_id for bundle in bundles)
    break_golden(store, bundles[1], monkeypatch)
    store.activate(second, first)
    for _ in range(3):
        await switch.step(service)
    assert service.current.bundle_id == first
    assert set(service.refused) == {second}
    assert "golden query" in service.refused[second]
    assert caplog.text.count(f"Bundle {second} is refused") == 1  # it is not tried every second
    store.activate(third, second)
    await switch.step(service)
    assert service.current.bundle_id == third
    assert service.refused == {}


async def test_a_damaged_bundle_is_refused(opened, store, bundles):
    switch, service = opened
    (part,) = (store.root.local / "bundles" / bundles[1].bundle_id).rglob("items.arrow")
    damaged = b"x" + part.read_bytes()[1:]
    part.unlink()  # the file is that of the Bundle that was added, too
    part.write_bytes(damaged)
    store.activate(bundles[1].bundle_id, bundles[0].bundle_id)
    await switch.step(service)
    assert service.current.bundle_id == bundles[0].bundle_id
    assert "BundleCorruptError" in service.refused[bundles[1].bundle_id]


async def test_what_was_refused_is_tried_again_when_the_pointer_moves(opened, store, bundles, monkeypatch):
    switch, service = opened
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    with monkeypatch.context() as patch:
        break_golden(store, bundles[1], patch)
        store.activate(second, first)
        await switch.step(service)
    assert set(service.refused) == {second}
    store.rollback()
    store.activate(second, first)
    await switch.step(service)
    assert service.current.bundle_id == second


async def test_a_gateway_that_starts_takes_the_bundle_before_where_the_current_one_is_bad(
    store, bundles, monkeypatch, tmp_path
):
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    store.activate(second, first)
    break_golden(store, bundles[1], monkeypatch)
    config = ServeConfig(
        bundle_uri=str(store),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "others.sqlite")),
    )
    service = await Switch(config, config.event_store.open(), {}).start()
    assert service.current.bundle_id == first
    assert set(service.refused) == {second}
    service.close()
    only = config.model_copy(update={"bundle_uri": str(bundles[1].path)})
    with pytest.raises(BundleError, match="golden query"):
        await Switch(only, config.event_store.open(), {}).start()


async def test_following_survives_a_store_that_cannot_be_read(opened, store, bundles, caplog):
    switch, service = opened
    switch._config = switch._config.model_copy(update={"poll_s": 0.01})
    following = asyncio.create_task(switch.follow(service))
    damaged = store.root.local / "current" / "00000002.json"
    damaged.write_text("{")
    await asyncio.sleep(0.1)
    assert "cannot be followed" in caplog.text
    damaged.unlink()
    store.activate(bundles[1].bundle_id, bundles[0].bundle_id)
    for _ in range(500):
        await asyncio.sleep(0.01)
        if service.current.bundle_id == bundles[1].bundle_id:
            break
    following.cancel()
    assert service.current.bundle_id == bundles[1].bundle_id


# --- canaries ---------------------------------------------------------------------------------------------------------


async def ask_everybody(service, num_users=400):
    """How many users each Bundle answers, and who is answered by which."""
    answers = {f"u{user}": await service.recommend(RecommendRequest(user_id=f"u{user}")) for user in range(num_users)}
    return {user: answer.bundle_id for user, (answer, _) in answers.items()}


async def test_a_share_of_the_users_gets_the_canary(opened, store, bundles):
    switch, service = opened
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    store.start_canary(second, 0.25)
    await switch.step(service)
    by_user = await ask_everybody(service)
    assert set(by_user.values()) == {first, second}
    assert 0.15 < sum(each == second for each in by_user.values()) / len(by_user) < 0.35
    assert await ask_everybody(service) == by_user  # always the same ones
    assert (await service.recommend(RecommendRequest()))[0].bundle_id == first
    store.promote()
    await switch.step(service)
    assert set((await ask_everybody(service, 20)).values()) == {second}
    assert service.canary is None


async def test_a_canary_can_be_ended(opened, store, bundles):
    switch, service = opened
    store.start_canary(bundles[1].bundle_id, 1.0)
    await switch.step(service)
    assert set((await ask_everybody(service, 20)).values()) == {bundles[1].bundle_id}
    store.withdraw(reason="changed my mind")
    await switch.step(service)
    assert set((await ask_everybody(service, 20)).values()) == {bundles[0].bundle_id}


@pytest.mark.parametrize("how", ["raises", "is degraded"])
async def test_a_canary_that_does_worse_is_taken_back(opened, store, bundles, monkeypatch, how):
    switch, service = opened
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    store.start_canary(second, 0.5)
    await switch.step(service)

    def broken(queries, candidates):
        raise StageError("broken", stage="ranking")

    if how == "raises":
        monkeypatch.setattr(service.canary.generation.recommender, "arecommend", None)
    else:
        monkeypatch.setattr(service.canary.generation.recommender.runner.stages[1].stage, "run_batch", broken)
    by_user = await ask_everybody(service, 100)
    assert set(by_user.values()) == ({first} if how == "raises" else {first, second})  # nobody goes without
    await switch.tidy(service)
    assert service.canary is None
    pointer = store.current()
    assert pointer.canary is None
    assert pointer.bundle_id == first
    assert "of its answers" in pointer.reason
    await switch.step(service)
    assert service.canary is None


def tally(num_answers, *, failed=0, degraded=0, took_ms=10.0):
    made = Tally()
    for place in range(num_answers):
        if place < failed:
            made.failed()
        else:
            made.answered(took_ms, degraded=place < failed + degraded)
    return made


def test_when_a_canary_is_worse():
    limits = CanaryLimits(min_answers=100)
    good = tally(1000)
    assert worse(tally(99, failed=99), good, limits) is None  # too few to tell
    assert worse(tally(100), good, limits) is None
    assert worse(tally(100, failed=1), tally(100), limits) is None  # one in a hundred may be chance
    assert "fail" in worse(tally(100, failed=5), good, limits)
    assert worse(tally(100, failed=5), tally(100, failed=5), limits) is None
    assert "degraded" in worse(tally(100, degraded=5), good, limits)
    assert "p95" in worse(tally(100, took_ms=50), tally(100, took_ms=30), limits)
    assert worse(tally(100, took_ms=19), tally(100, took_ms=3), limits) is None  # fast enough for anybody
    assert worse(tally(100, took_ms=50), tally(99, took_ms=30), limits) is None
    old = tally(100, failed=100)
    for _ in range(2000):
        old.answered(10.0, degraded=False)
    assert worse(old, good, limits) is None  # only what was lately


async def test_what_says_nothing_of_a_bundle_does_not_count(opened, store, bundles):
    switch, service = opened
    store.start_canary(bundles[1].bundle_id, 1.0)
    await switch.step(service)
    for _ in range(30):
        await service.recommend(RecommendRequest())  # a stranger
        answer, _ = await service.recommend(RecommendRequest(user_id="u1", deadline_ms=1.0))  # too little time
        assert answer.bundle_id == bundles[1].bundle_id
    assert len(service.current.tally) == len(service.canary.generation.tally) == 0


async def test_a_canary_that_is_started_anew_is_judged_anew(opened, store, bundles):
    switch, service = opened
    store.start_canary(bundles[1].bundle_id, 0.5)
    await switch.step(service)
    before = service.canary
    for _ in range(100):
        before.generation.tally.failed()
    store.withdraw()
    store.start_canary(bundles[1].bundle_id, 0.5)
    await switch.step(service)
    assert service.canary is not before
    await switch.tidy(service)
    assert service.canary is not None


async def test_an_item_that_only_the_canary_has_is_found(opened, store, bundles, monkeypatch):
    switch, service = opened
    store.start_canary(bundles[1].bundle_id, 0.5)
    await switch.step(service)
    assert service.knowing("i1") is service.current
    monkeypatch.setattr(service.current.recommender, "item", lambda item_id: None)
    assert service.knowing("i1") is service.canary.generation


# --- the order of things ----------------------------------------------------------------------------------------------


async def test_user_states_start_from_a_bundle_only_once_it_answers(opened, store, bundles, monkeypatch):
    switch, service = opened
    first, second, third = (bundle.bundle_id for bundle in bundles)
    seeded = []
    monkeypatch.setattr(service.store, "seed", lambda bundle_id, *_: seeded.append(bundle_id))
    with monkeypatch.context() as patch:
        break_golden(store, bundles[1], patch)
        store.activate(second, first)
        await switch.step(service)
    assert seeded == []
    store.rollback()
    store.start_canary(third, 0.5)
    await switch.step(service)
    assert service.canary is not None
    assert seeded == []
    store.promote()
    await switch.step(service)
    assert seeded == [third]


async def test_a_pointer_that_moved_meanwhile_is_not_followed_to_where_it_was(opened, store, bundles, monkeypatch):
    switch, service = opened
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    store.activate(second, first)
    prepare = switch._prepare

    async def slowly(*arguments):
        generation = await prepare(*arguments)
        store.rollback()
        return generation

    monkeypatch.setattr(switch, "_prepare", slowly)
    await switch.step(service)
    assert service.current.bundle_id == first
    await turn(switch, service, 2)
    assert service.current.bundle_id == first
    assert service.retired == []


async def test_after_two_bad_bundles_a_new_gateway_answers_from_the_last_good_one(
    store, bundles, monkeypatch, tmp_path
):
    first, second, third = (bundle.bundle_id for bundle in bundles)
    store.activate(second, first)
    store.activate(third, second)
    real = switch_module.Generation.open

    def opened(bundle, *rest):
        if bundle.bundle_id == second:
            raise KeyError("nobody expected that")
        return real(bundle, *rest)

    monkeypatch.setattr(switch_module.Generation, "open", opened)
    break_golden(store, bundles[2], monkeypatch)
    config = ServeConfig(
        bundle_uri=str(store),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "others.sqlite")),
    )
    switch = Switch(config, config.event_store.open(), {})
    service = await switch.start()
    assert service.current.bundle_id == first
    assert set(service.refused) == {second, third}
    await switch.step(service)
    assert set(service.refused) == {third}  # and not tried again at once
    assert store.collect(keep=3) == ()
    service.close()


def test_a_stage_that_starts_where_the_newest_are_bad_has_the_last_good_one(store, bundles):
    first, second, third = (bundle.bundle_id for bundle in bundles)
    store.activate(second, first)
    store.activate(third, second)

    def build(bundle):
        if bundle.bundle_id != first:
            raise BundleError("broken")
        return bundle

    assert Shelf("ranking", str(store), build).get(first).bundle_id == first


def test_a_pointer_that_moves_while_a_stage_starts_is_seen(store, bundles):
    first, second, _ = (bundle.bundle_id for bundle in bundles)

    def build(bundle):
        if bundle.bundle_id == first:
            store.activate(second, first)
        return bundle

    shelf = Shelf("ranking", str(store), build)
    assert [stage.bundle_id for stage in shelf.stages] == [first, second]


# --- stages in processes of their own ---------------------------------------------------------------------------------


class Replica:
    """A stage of one replica whose Bundles load when the test says so."""

    def __init__(self, name, present=True):
        self.name, self.present = name, present
        self.ready, self.failed = set(), {}

    def info(self, bundle_id):
        if bundle_id in self.failed:
            return StageInfo(self.name, bundle_id, "failed", problem=self.failed[bundle_id])
        return StageInfo(self.name, bundle_id, "ready" if bundle_id in self.ready else "loading", self.present)


class Pool:
    def __init__(self, name, *replicas):
        self.name, self.replicas, self.held = name, list(replicas), []

    async def hold(self, bundle_ids):
        self.held.append(tuple(bundle_ids))
        return [{bundle_id: replica.info(bundle_id) for bundle_id in bundle_ids} for replica in self.replicas]

    async def run(self, query, candidates):
        raise StageError("not here", stage=self.name)


async def test_a_gateway_turns_when_every_replica_has_the_bundle(opened, store, bundles, monkeypatch):
    switch, service = opened
    first, second, _ = (bundle.bundle_id for bundle in bundles)
    monkeypatch.setattr(switch_module.Generation, "prove", lambda self, timeout_s: asyncio.sleep(0))
    slow, quick = Replica("ranking"), Replica("ranking")
    pool = switch._remote["ranking"] = Pool("ranking", slow, quick)
    quick.ready |= {first, second}
    slow.ready.add(first)
    store.activate(second, first)
    turning = asyncio.create_task(switch.step(service))
    await asyncio.sleep(0.1)
    assert service.current.bundle_id == first
    assert pool.held[-1] == (second, first)  # the old one must stay loaded meanwhile
    slow.ready.add(second)
    await turning
    assert service.current.bundle_id == second
    assert service.current.recommender.runner.stages[1] is pool
    await switch.hold(service)
    assert set(pool.held[-1]) == {first, second}  # until its last request is answered
    await turn(switch, service, 2)
    await switch.hold(service)
    assert pool.held[-1] == (second,)


async def test_a_replica_that_cannot_load_a_bundle_has_it_refused(opened, store, bundles):
    switch, service = opened
    replica = Replica("ranking")
    replica.ready.add(bundles[0].bundle_id)
    replica.failed[bundles[1].bundle_id] = "no such file"
    switch._remote["ranking"] = Pool("ranking", replica)
    store.activate(bundles[1].bundle_id, bundles[0].bundle_id)
    await switch.step(service)
    assert service.current.bundle_id == bundles[0].bundle_id
    assert "ranking: no such file" in service.refused[bundles[1].bundle_id]


async def test_a_stage_that_a_bundle_lacks_is_left_out(opened, store, bundles, monkeypatch):
    switch, service = opened
    monkeypatch.setattr(switch_module.Generation, "prove", lambda self, timeout_s: asyncio.sleep(0))
    replica = Replica("ranking", present=False)
    replica.ready |= {bundle.bundle_id for bundle in bundles}
    switch._remote["ranking"] = Pool("ranking", replica)
    store.activate(bundles[1].bundle_id, bundles[0].bundle_id)
    await switch.step(service)
    assert [stage.name for stage in service.current.recommender.runner.stages] == ["retrieval", "reranking"]


def test_a_shelf_loads_what_is_named_and_forgets_what_is_not(store, bundles, monkeypatch):
    first, second, third = (bundle.bundle_id for bundle in bundles)
    built = []

    def build(bundle):
        built.append(bundle.bundle_id)
        if bundle.bundle_id == third:
            raise BundleError("broken")
        return bundle

    clock = 1000.0
    monkeypatch.setattr(shelf_module.time, "monotonic", lambda: clock)
    shelf = Shelf("ranking", str(store), build)
    assert built == [first]
    assert shelf.hold([second])[second].state == "loading"
    while shelf.hold([second])[second].state == "loading":
        pass
    assert shelf.get(second).bundle_id == second
    assert [stage.bundle_id for stage in shelf.stages] == [first, second]
    while shelf.hold([third])[third].state == "loading":
        pass
    info = shelf.hold([third])[third]
    assert (info.state, info.problem) == ("failed", "BundleError: broken")
    clock += 61
    assert shelf.hold([second, third])[third].state == "loading"  # once more, after a while
    while shelf.hold([third])[third].state == "loading":
        pass
    assert built == [first, second, third, third]
    assert [stage.bundle_id for stage in shelf.stages] == [second]
    assert shelf.get(first) is None  # but now it is on its way
    while shelf.hold([first])[first].state == "loading":
        pass
    assert shelf.get(first).bundle_id == first


def test_a_shelf_without_any_bundle_does_not_start(store):
    def build(bundle):
        raise BundleError("broken")

    with pytest.raises(BundleError, match=r"no Bundle that can be loaded: BundleError: broken"):
        Shelf("ranking", str(store), build)
