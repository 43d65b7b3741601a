"""What keeps an update from taking over, besides that it finds less."""

import numpy as np
import pytest

from recsys.bundle.store import BundleStore
from recsys.data.dataset import Split
from recsys.evaluation.protocol import EvaluationConfig, rank_scores
from recsys.events import Event
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.models.base import VectorRetriever
from recsys.online.config import GateConfig
from recsys.online.gate import Contestant, judge
from recsys.online.log import grow

EVALUATION = EvaluationConfig(num_bootstrap=100)
NUM_CLUSTERS, NUM_ITEMS = 10, 100


class Changed(VectorRetriever):
    """One whose scores are multiplied, and those of item ``n`` given to item ``n + shift``."""

    def __init__(self, base, scale, shift):
        self.config, self.num_items, self.num_vectors = base.config, base.num_items, base.num_vectors
        self.base, self.scale, self.shift = base, scale, shift

    def score(self, histories, now_ms=None):
        return np.roll(self.base.score(histories, now_ms) * np.float32(self.scale), self.shift, axis=1)

    def encode_users(self, histories, now_ms=None):
        raise NotImplementedError

    def item_vectors(self):
        raise NotImplementedError

    def save_weights(self, folder):
        raise NotImplementedError


@pytest.fixture(scope="module")
def parent(published):
    return BundleStore(published).open()


@pytest.fixture(scope="module")
def dataset(parent, tmp_path_factory):
    """The rings go on as the parent has learned them."""
    rng = np.random.default_rng(0)
    made = []
    for user in range(40):
        item = int(rng.integers(NUM_ITEMS))
        for place in range(8):
            time_ms = 1_736_000_000_000 + 60_000 * (place * 40 + user)
            made.append(Event(f"{user}-{place}", f"new-{user}", f"item-{item}", "interaction", time_ms))
            item = (item + NUM_CLUSTERS) % NUM_ITEMS
    with SqliteEventStoreConfig(path=str(tmp_path_factory.mktemp("events") / "events.sqlite")).open() as store:
        store.append(made)
        (events,) = store.log()
    return grow(parent, events, log_only=(), judge_share=0.5, protocol="rolling_next_item").dataset


def reasons(parent, dataset, *, scale=1.0, shift=0, **gate):
    def contestant(scale, shift):
        retriever = Changed(parent.retriever(), scale, shift)

        def rank(targets):
            return rank_scores(retriever.score(targets.histories, targets.now_ms), targets.left_out, EVALUATION.depth)

        return Contestant(rank, retriever)

    verdict = judge(contestant(1.0, 0), contestant(scale, shift), dataset, EVALUATION, GateConfig(**gate))
    assert verdict.passed == (not verdict.reasons)
    return verdict


def test_the_same_again_passes(parent, dataset):
    assert len(dataset.targets(Split.TEST)) >= 50
    verdict = reasons(parent, dataset)
    assert verdict.passed
    assert verdict.figures["overlap@10"] == 1.0
    assert verdict.figures["miscalibration"][0] == verdict.figures["miscalibration"][1]


def test_who_recommends_other_things_has_drifted(parent, dataset):
    """However little is lost: all of it is allowed here."""
    verdict = reasons(parent, dataset, shift=1, max_loss=1.0, max_miscalibration=1e9)
    assert any("drift: " in reason for reason in verdict.reasons), verdict
    assert not any("drift" in each for each in reasons(parent, dataset, shift=1, min_overlap=0).reasons)


def test_who_promises_more_than_it_keeps_is_out(parent, dataset):
    """The order of the items is the same, and so is all that is measured by it."""
    verdict = reasons(parent, dataset, scale=0.01)
    assert len(verdict.reasons) == 1
    assert "calibration: " in verdict.reasons[0]
    assert verdict.figures["parent"] == verdict.figures["child"]
    assert reasons(parent, dataset, scale=0.01, max_miscalibration=1e9).passed
