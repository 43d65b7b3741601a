"""What single sequence models have for themselves: time, and blanks."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.data.histories import Histories
from recsys.models.base import FitData
from recsys.models.retrievers.sequences.base import _token_times
from recsys.models.retrievers.sequences.bert4rec import BERT4Rec
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.retrievers.sequences.hstu import HSTU
from recsys.models.retrievers.sequences.sasrec import SASRec
from recsys.testing.planted import planted_clusters
from recsys.training.loop import TrainConfig
from recsys.training.runtime import Runtime
from recsys.training.sampling import cut_windows, rng_for, split_batch

MINUTE, DAY = 60_000, 86_400_000


def test_hstu_knows_how_long_ago_the_last_interaction_was() -> None:
    """After a minute item 0 follows, after a day item 1, whatever came before: nothing but the time tells."""
    rng = np.random.default_rng(0)
    lists: list[list[int]] = []
    times: list[list[int]] = []
    for _ in range(100):
        items, at, now = [], [], 1_600_000_000_000
        for _ in range(6):
            soon = bool(rng.integers(2))
            items += [int(rng.integers(2, 12)), 0 if soon else 1]
            at += [now, now + (MINUTE if soon else DAY)]
            now = at[-1] + 3 * DAY
        lists.append(items)
        times.append(at)
    histories = Histories.from_lists(lists, times)
    table = planted_clusters().items.slice(0, 12)
    train = TrainConfig(epochs=15, batch_tokens=128, learning_rate=1e-2, warmup_steps=5)
    config = HSTU(dim=16, num_blocks=1, max_length=20, dropout=0.0, num_negatives=0, train=train)
    fitted = config.fit(FitData(histories, np.ones(len(histories.item_idx), np.float32), table), Runtime("cpu"))
    last = 1_700_000_000_000
    asked = Histories.from_lists([[5, 0, 7]] * 2, [[last - 4 * DAY, last - 4 * DAY + MINUTE, last]] * 2)
    soon, late = fitted.score(asked, np.array([last + MINUTE, last + DAY]))
    assert soon.argmax() == 0
    assert late.argmax() == 1


def test_when_a_token_is_read_and_when_its_answer_is_asked_for() -> None:
    """Two histories with a start before them, and an empty one that is a start alone."""
    is_item = np.array([False, True, True, False, False, True])
    lengths = np.array([3, 1, 2])
    item_time = np.array([10, 20, 50])
    without = _token_times(item_time, is_item, lengths, None)
    assert without.tolist() == [[10, 10], [10, 20], [20, 20], [0, 0], [50, 50], [50, 50]]
    asked = _token_times(item_time, is_item, lengths, np.array([90, 91, 92]))
    assert asked.tolist() == [[10, 10], [10, 20], [20, 90], [91, 91], [50, 50], [50, 92]]


def test_every_window_has_a_blank_and_about_the_share_asked_for() -> None:
    histories = Histories.from_lists([[1] * length for length in [1, 2, 30, 7] * 40])
    (part,) = split_batch(cut_windows(histories, 10, rng_for(0, 1)), 1)
    blank = BERT4Rec(blank_share=0.3).blanks(part, rng_for(0, 2).random(40 * 40))
    per_window = np.add.reduceat(blank, np.cumsum(part.lengths) - part.lengths)
    assert (per_window > 0).all()
    long = np.repeat(part.lengths == 10, part.lengths)
    assert abs(blank[long].mean() - 0.3) < 0.05


@pytest.mark.parametrize("kind", [SASRec, HSTU, BERT4Rec])
def test_heads_share_the_dimensions(kind) -> None:
    assert kind(dim=12, num_heads=4).num_heads == 4
    with pytest.raises(ValueError, match=r"dim \(12\) must be a multiple of num_heads \(5\)"):
        kind(dim=12, num_heads=5)


def test_a_head_with_rotary_positions_has_an_even_number_of_dimensions() -> None:
    assert ESASRec(dim=16, num_heads=4).num_heads == 4
    with pytest.raises(ValueError, match=r"dim \(12\) must be a multiple of 2 \* num_heads \(4\)"):
        ESASRec(dim=12, num_heads=4)
