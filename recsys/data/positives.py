"""What counts as a positive, and how much: one rule per event, used by preparation and by serving alike."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from recsys.arrow import pc
from recsys.config import StrictConfig
from recsys.types import BoolArray, FloatArray


class EventRule(StrictConfig):
    """How much one kind of event counts."""

    weight: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="Weight of a positive (no unit, 0 to 1e6); 0 means seen, but no positive.",
    )
    negative: bool = Field(
        default=False,
        description="The user wants no more of the item: it is not recommended until a positive comes after it, or "
        "this is no more among the newest events that a user's state holds.",
    )
    min_value: float | None = Field(
        default=None,
        description="Smallest value that counts, itself included, in the unit of the event; None for no bound.",
    )
    max_value: float | None = Field(
        default=None,
        description="Largest value that counts, itself included, in the unit of the event; None for no bound.",
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_value is not None and self.max_value is not None and self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value} is above max_value {self.max_value}: no value could count")
        if self.negative and self.weight:
            raise ValueError(f"weight {self.weight} of a negative: what the user wants no more of is no positive")
        return self


class PositivePolicy(StrictConfig):
    """Turns an event and its value into a weight.

    An event without a rule weighs 0: the item was seen, and nothing more is learned from it. Where a rule has a
    bound, an event without a value weighs 0 too.
    """

    events: dict[str, EventRule] = Field(
        default={
            "interaction": EventRule(),
            "click": EventRule(),
            "purchase": EventRule(),
            "rating": EventRule(min_value=3.5),
            "hide": EventRule(weight=0.0, negative=True),
            "dislike": EventRule(weight=0.0, negative=True),
        },
        min_length=1,
        description="Rule per event name; other events weigh 0 (seen only). Replaces the default whole.",
    )

    def weights(self, events: pa.Array | pa.ChunkedArray, values: Any) -> FloatArray:
        """float32 [R]: weight of each event. ``events`` hold text (or its dictionary form), ``values`` numbers or null.

        Values and bounds are compared as float32, the precision of the contract.
        """
        return self.judge(events, values)[0]

    def judge(self, events: pa.Array | pa.ChunkedArray, values: Any) -> tuple[FloatArray, BoolArray]:
        """float32 [R] and bool [R]: the :meth:`weights`, and which events say that a user wants no more of an item."""
        names = events.combine_chunks() if isinstance(events, pa.ChunkedArray) else events
        if not pa.types.is_dictionary(names.type):
            names = names.dictionary_encode()
        column = pa.chunked_array([values]) if isinstance(values, pa.Array) else values
        amount = pc.fill_null(column.cast(pa.float32()), float("nan")).to_numpy()
        # Row 0 of each table is for a missing event (-1), so codes are shifted by one.
        rules = [None, *(self.events.get(name) for name in names.dictionary.to_pylist())]
        weight = np.array([0.0 if rule is None else rule.weight for rule in rules], np.float32)
        low = np.array([np.nan if r is None or r.min_value is None else r.min_value for r in rules], np.float32)
        high = np.array([np.nan if r is None or r.max_value is None else r.max_value for r in rules], np.float32)
        code = pc.fill_null(names.indices, -1).to_numpy(zero_copy_only=False) + 1
        counts = (np.isnan(low)[code] | (amount >= low[code])) & (np.isnan(high)[code] | (amount <= high[code]))
        negative = np.array([rule is not None and rule.negative for rule in rules])
        return np.where(counts, weight[code], np.float32(0)), counts & negative[code]
