"""Weights of events: bounds are inclusive, the unlisted weighs nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.positives import EventRule, PositivePolicy
from recsys.errors import ConfigError

POLICY = PositivePolicy(
    events={
        "rating": EventRule(weight=2.0, min_value=3.5, max_value=5.0),
        "purchase": EventRule(weight=1.5),
        "hide": EventRule(weight=0.0),
    }
)


def weight_of(policy: PositivePolicy, event: str, value: float | None = None) -> float:
    return float(policy.weights(pa.array([event]), pa.array([value], pa.float32()))[0])


@pytest.mark.parametrize(
    ("event", "value", "weight"),
    [
        ("rating", 3.5, 2.0),
        ("rating", 3.4, 0.0),
        ("rating", 5.0, 2.0),
        ("rating", 5.5, 0.0),
        ("rating", None, 0.0),
        ("purchase", None, 1.5),
        ("purchase", -3.0, 1.5),
        ("hide", None, 0.0),
        ("impression", 9.0, 0.0),
    ],
)
def test_weight_of_one_event(event: str, value: float | None, weight: float) -> None:
    assert weight_of(POLICY, event, value) == weight


def test_vector_form_takes_strings_dictionaries_and_chunks() -> None:
    events = ["purchase", "rating", "nothing", "rating", None]
    values = [None, 4.0, 4.0, 1.0, 4.0]
    expected = np.array([1.5, 2.0, 0.0, 0.0, 0.0], np.float32)
    plain = POLICY.weights(pa.array(events), pa.array(values, pa.float32()))
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(plain, expected)
    coded = pa.array(events).dictionary_encode()
    np.testing.assert_array_equal(POLICY.weights(coded, pa.array(values, pa.float64())), expected)
    chunked = pa.chunked_array([events[:2], events[2:]])
    np.testing.assert_array_equal(
        POLICY.weights(chunked, pa.chunked_array([values[:1], values[1:]], pa.float32())), expected
    )
    assert POLICY.weights(pa.array([], pa.string()), pa.array([], pa.float32())).shape == (0,)


def test_default_policy_knows_the_events_of_the_sources() -> None:
    default = PositivePolicy()
    assert weight_of(default, "rating", 3.5) == 1
    assert weight_of(default, "rating", 3.0) == 0
    assert weight_of(default, "purchase") == weight_of(default, "interaction") == weight_of(default, "click") == 1
    assert weight_of(default, "hide") == weight_of(default, "impression") == 0


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"events": {}}, "events"),
        ({"events": {"x": {"weight": -1}}}, "weight"),
        ({"events": {"x": {"min_value": 2, "max_value": 1}}}, "no value could count"),
        ({"events": {"x": {"minimum": 2}}}, "minimum"),
    ],
)
def test_senseless_rules_are_refused(tree: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PositivePolicy.parse(tree, where="test")
