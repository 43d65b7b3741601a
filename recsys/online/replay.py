"""What to learn of a log that was mostly learned before: what is new, and against forgetting some of what is not."""

from __future__ import annotations

import numpy as np

from recsys.data.histories import Histories
from recsys.models.base import Lesson
from recsys.models.stand_in import StandIns
from recsys.training.sampling import rng_for
from recsys.types import BoolArray


def lesson_of(
    histories: Histories,
    fresh: BoolArray,
    *,
    max_length: int,
    replay: float,
    seed: int,
    stand_ins: StandIns | None = None,
) -> Lesson:
    """The ``fresh`` rows (bool [R]) with what came right before them, and a stretch of as many other users.

    ``histories`` has one history per user. All that is not fresh weighs so little that together it makes up the share
    ``replay`` of the whole weight; by it the model keeps what it knows (experience replay: Rolnick et al., NeurIPS
    2019), of the users whom it learns from and of others.
    """
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(fresh, dtype=np.int64)])
    count = running[histories.stops] - running[histories.starts]
    learns = np.flatnonzero(count > 0)
    first = np.searchsorted(running, running[histories.starts[learns]] + 1) - 1  # of each user's fresh rows
    # A window that begins with something new would be read without what came before it.
    begins = np.minimum(first - max_length // 2, histories.stops[learns] - max_length)
    begins = np.maximum(histories.starts[learns], begins)
    others = np.flatnonzero((count == 0) & (histories.lengths > 0))
    rng = rng_for(seed, 7)
    drawn = np.sort(rng.choice(others, min(len(others), len(learns)), replace=False)) if replay else others[:0]
    room = np.maximum(histories.lengths[drawn] - max_length, 0)
    replayed = histories.starts[drawn] + (rng.random(len(drawn)) * (room + 1)).astype(np.int64)
    users = np.concatenate([learns, drawn])
    starts = np.concatenate([begins, replayed])
    stops = np.concatenate([histories.stops[learns], np.minimum(replayed + max_length, histories.stops[drawn])])
    num_fresh = int(count.sum())
    num_other = int((stops - starts).sum()) - num_fresh
    wanted = replay / (1 - replay) * num_fresh
    weight = np.full(len(fresh), min(1.0, wanted / max(1, num_other)) or _NEXT_TO_NOTHING, np.float32)
    weight[fresh] = 1.0
    stretches = Histories(histories.item_idx, starts, stops, histories.timestamp_ms)
    return Lesson(stretches, starts == histories.starts[users], weight, stand_ins)


_NEXT_TO_NOTHING = 1e-6
"""the weight of a step is what its loss is divided by, so it must not be zero"""
