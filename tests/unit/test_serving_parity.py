"""What is served is what was trained: the same features and the same scores, computed online and offline.

And what a user does now shows in what they are shown next.
"""

import asyncio
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from jobs import pipeline
from jobs.steps import prepare, train_ranker, train_retriever
from recsys.bundle.store import BundleStore
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Split
from recsys.data.features import ItemFeatures, candidate_features
from recsys.events import Event
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.models.rankers.queries import RankingItems
from recsys.online.log import grow
from recsys.pipeline.build import Parts
from recsys.pipeline.offline import OfflinePipeline
from recsys.pipeline.recommender import Recommender
from recsys.pipeline.requests import RecommendRequest
from recsys.pipeline.stage import STAGES

NUM_CLUSTERS = 10


@pytest.fixture(scope="module")
def steps(trained_job):
    """The results of the steps, found again."""
    return pipeline.run(trained_job)


@pytest.fixture(scope="module")
def dataset(steps):
    return steps[prepare.STEP].dataset()


@pytest.fixture
def recommender(published):
    with Recommender.load(published) as recommender:
        yield recommender


def test_served_requests_come_out_the_same_offline(recommender, steps, dataset, trained_job):
    """Every request is replayed through the stages of the jobs, over the prepared data: same items, same scores."""
    targets = dataset.everybody()[:60]
    now_ms = int(targets.now_ms[0])
    retriever = steps[train_retriever.STEP].load("final")
    ranker = steps[train_ranker.STEP].load("final")
    parts = Parts.of_models(Catalogue.build(dataset.items), retriever, trained_job.index, ranker)
    offline = OfflinePipeline(parts, trained_job.pipeline).slates(targets, 10)
    ids = dataset.items["item_id"].to_pylist()
    for user, expected in zip(targets.user_idx.tolist(), offline, strict=True):
        request = RecommendRequest(user_id=dataset.users["user_id"][user].as_py(), top_k=10)
        served = asyncio.run(recommender.arecommend(request, now_ms=now_ms))
        assert served.degraded == ()
        assert served.item_ids == [ids[item] for item in expected.item_idx]
        for stage in STAGES:
            online = [item.stage_scores[stage] for item in served.items]
            np.testing.assert_allclose(online, expected.stage_scores[stage], rtol=1e-4, atol=1e-4)


def test_what_happened_since_counts_online_as_it_does_offline(published, trained_job, tmp_path):
    """Events of users old and new, some of them late, come to the store one by one and to the jobs as a log."""
    bundle = BundleStore(published).open()
    last_ms = max(times[-1] for times in bundle.histories()["timestamps_ms"].to_pylist() if times)
    rng = np.random.default_rng(0)
    events = []
    for number in range(160):
        at_ms = last_ms + int(rng.integers(1, 10**8)) * (-1 if number % 4 == 0 else 1)
        item_id = f"item-{rng.integers(100)}"
        events.append(Event(str(number), f"user-{270 + number % 40}", item_id, "interaction", at_ms))
    with SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")).open() as store:
        store.seed(bundle.bundle_id, bundle.histories(), None)
        for event in events:
            store.append([event])
        log = pa.concat_tables(store.log())
        grown = grow(bundle, log, log_only=(), judge_share=0.3, protocol="rolling_next_item").dataset
        targets = grown.everybody()[260:310]
        user_ids = grown.users["user_id"].to_pylist()[260:310]
        assert user_ids == [f"user-{number}" for number in range(260, 310)]
        parts = Parts.of_models(
            Catalogue.build(grown.items), bundle.retriever(), trained_job.index, bundle.ranker(), bundle.popular()
        )
        pipeline = OfflinePipeline(parts, trained_job.pipeline)
        queries, offline = pipeline.queries(targets, 10), pipeline.slates(targets, 10)
        with Recommender.load(published, store) as recommender:
            for user_id, query, expected in zip(user_ids, queries, offline, strict=True):
                request = RecommendRequest(user_id=user_id, top_k=10)
                served = asyncio.run(recommender.arecommend(request, now_ms=query.now_ms))
                assert served.degraded == ()
                history = served.slate.query.history
                np.testing.assert_array_equal(history.item_idx, query.history.item_idx)
                np.testing.assert_array_equal(history.timestamp_ms, query.history.timestamp_ms)
                items = grown.items["item_id"].take(pa.array(expected.item_idx)).to_pylist()
                assert served.item_ids == items
                for stage in STAGES:
                    online = [item.stage_scores[stage] for item in served.items]
                    np.testing.assert_allclose(online, expected.stage_scores[stage], rtol=1e-4, atol=1e-4)


def test_a_newcomer_gets_the_same_online_and_offline(published, dataset, trained_job):
    bundle = BundleStore(published).open()
    nobody = dataset.everybody()[:1]
    nobody = replace(nobody, histories=nobody.histories.last(0), seen=nobody.seen.last(0))
    parts = Parts.of_models(
        Catalogue.build(dataset.items), bundle.retriever(), trained_job.index, bundle.ranker(), bundle.popular()
    )

    def ranked(newcomers):
        config = trained_job.pipeline.model_copy(update={"newcomers": newcomers})
        return OfflinePipeline(parts, config).rank(nobody, 10)[0]

    offline, modelled = ranked("popular"), ranked("models")
    assert offline.tolist() != modelled.tolist()
    ids = dataset.items["item_id"].to_pylist()
    for newcomers, expected in (("popular", offline), ("models", modelled)):
        config = trained_job.pipeline.model_copy(update={"newcomers": newcomers})
        with Recommender.load(published, config=config) as recommender:
            request = RecommendRequest(user_id="a stranger", top_k=10)
            served = asyncio.run(recommender.arecommend(request, now_ms=int(nobody.now_ms[0])))
        assert served.degraded == ()
        assert served.item_ids == [ids[item] for item in expected]


def test_features_are_the_same_online_and_offline(recommender, steps, dataset, published):
    """The item side that the Bundle carries gives, for a served request, what the prepared data gives at its end."""
    bundle = BundleStore(published).open()
    held = bundle.ranker().items
    retriever = steps[train_retriever.STEP].load("final")
    made = RankingItems.of(ItemFeatures.of(dataset, Split.TEST), retriever.item_embeddings())
    for user_id in ("user-1", "user-7", "user-42"):
        answer = recommender.recommend(user_id=user_id, top_k=10)
        query, shown = answer.slate.query, answer.slate.selected
        user = dataset.users["user_id"].to_pylist().index(user_id)
        history = dataset.positives.histories(Split.TEST)[np.array([user])].pack()
        online, offline = (
            candidate_features(
                items.features,
                items.unit_vectors,
                history_item_idx=item_idx,
                history_timestamp_ms=times,
                candidate_item_idx=shown.item_idx,
                retrieval_score=shown.stage_scores["retrieval"],
                now_ms=query.now_ms,
            )
            for items, item_idx, times in (
                (held, query.history.item_idx, query.history.timestamp_ms),
                (made, history.item_idx, history.timestamp_ms),
            )
        )
        np.testing.assert_allclose(online, offline, rtol=1e-5, atol=1e-6)


def test_three_events_of_a_new_kind_move_the_next_slate(published, tmp_path):
    """Users of one ring take three items of another, one after the next, and half of what comes is from there."""
    moved = []
    with SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")).open() as store:
        bundle = BundleStore(published).open()
        store.seed(bundle.bundle_id, bundle.histories(), None)
        with Recommender.load(published, store) as recommender:
            for user in range(40):
                state = store.user(f"user-{user}")
                rings = {int(item_id[5:]) % NUM_CLUSTERS for item_id in state.item_ids[-10:]}
                ring = next(number for number in range(NUM_CLUSTERS) if number not in rings)
                before = share_of(recommender.recommend(user_id=f"user-{user}"), ring)
                first_ms = int(state.timestamps_ms[-1]) + 1000
                for step in range(3):
                    item_id = f"item-{ring + step * NUM_CLUSTERS}"
                    event = Event(f"{user}-{step}", f"user-{user}", item_id, "interaction", first_ms + step)
                    store.append([event])
                moved.append((before, share_of(recommender.recommend(user_id=f"user-{user}"), ring)))
    before, after = np.array(moved).T
    assert np.mean(before) < 0.2
    assert np.median(after) >= 0.5


def share_of(answer, ring):
    """Of the new ring's seven items that are left, or of the slate, whichever is smaller: how much is shown."""
    shown = sum(int(item_id[5:]) % NUM_CLUSTERS == ring for item_id in answer.item_ids)
    return shown / min(len(answer.item_ids), 7)
