"""Every kind of rating model keeps the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.data.dataset import Split
from recsys.data.histories import Histories
from recsys.errors import DataError, EmptyDataError, ModelError
from recsys.models.ratings import KINDS, load_rating_model
from recsys.models.ratings.base import Rated, RatingConfig, RatingModel, RatingQuestions
from recsys.models.ratings.biases import Biases
from recsys.testing.planted import planted_clusters
from recsys.testing.samples import sample_of

NUM_ITEMS, NUM_USERS = 24, 160


def planted(seed: int = 0) -> tuple[Rated, Rated, np.ndarray, np.ndarray]:
    """Users are generous or not, items good or not, and half of the users like odd items, the others even ones.

    The histories of all users, and those of other users with a question and its answer each.
    """
    rng = np.random.default_rng(seed)
    users, items = rng.normal(scale=0.5, size=2 * NUM_USERS), rng.normal(scale=0.5, size=NUM_ITEMS)
    log, values = [], []
    for user in range(2 * NUM_USERS):
        rated = rng.permutation(NUM_ITEMS)[:13]
        likes = np.where(rated % 2 == user % 2, 0.8, -0.8)
        log.append(rated.tolist())
        values += (3 + users[user] + items[rated] + likes + rng.normal(scale=0.1, size=13)).tolist()
    histories = Histories.from_lists(log)
    array = np.array(values, np.float32)
    mine, others = histories[:NUM_USERS], histories[NUM_USERS:]
    last = others.stops - 1
    before = Histories(others.item_idx, others.starts, last)
    return Rated(mine, array, NUM_ITEMS), Rated(before, array, NUM_ITEMS), others.item_idx[last], array[last]


@pytest.fixture(scope="module", params=KINDS.names)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RatingConfig:
    return sample_of(KINDS.get(request.param), tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def fitted(config: RatingConfig) -> RatingModel:
    return config.fit(planted()[0])


def rmse(model: RatingModel) -> float:
    _, asked, item_idx, answers = planted()
    return float(np.sqrt(np.mean((model.predict(asked, item_idx) - answers) ** 2)))


def test_it_is_listed(config: RatingConfig) -> None:
    assert KINDS.parse(config.model_dump(mode="json"), where="test") == config


def test_it_finds_what_was_planted(fitted: RatingModel) -> None:
    assert rmse(fitted) < fitted.config.max_rmse


def test_biases_find_users_and_items_but_no_taste() -> None:
    """Noise alone is 0.1, taste 0.8, and what users and items are by themselves 0.5 each."""
    data = planted()[0]
    nothing = Biases(item_shrinkage=1e9, user_shrinkage=1e9).fit(data)
    assert 1.0 < rmse(nothing) < 1.2
    assert 0.8 < rmse(Biases().fit(data)) < 0.95


def test_saving_keeps_the_answers(fitted: RatingModel, tmp_path: Path) -> None:
    _, asked, item_idx, _ = planted()
    fitted.save(tmp_path)
    loaded = load_rating_model(tmp_path)
    assert loaded.config == fitted.config
    np.testing.assert_array_equal(loaded.predict(asked, item_idx), fitted.predict(asked, item_idx))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_nobody_and_nothing_are_answered(fitted: RatingModel) -> None:
    found = fitted.predict(strangers(2), np.array([0, 5], np.int32))
    assert np.isfinite(found).all()
    assert found[0] != found[1]
    assert fitted.predict(strangers(0), np.zeros(0, np.int32)).shape == (0,)


def strangers(num: int) -> Rated:
    return Rated(Histories.from_lists([[]] * num), np.zeros(0, np.float32), NUM_ITEMS)


def test_the_same_answers_whatever_order_and_company(fitted: RatingModel) -> None:
    _, asked, item_idx, _ = planted()
    whole = fitted.predict(asked, item_idx)
    rows = np.array([7, 3, 3, 90])
    part = Rated(asked.histories[rows], asked.values, NUM_ITEMS)
    np.testing.assert_allclose(fitted.predict(part, item_idx[rows]), whole[rows], atol=1e-5)


def test_the_newest_rating_of_an_item_counts(fitted: RatingModel) -> None:
    twice = Rated(Histories.from_lists([[3, 4, 3]]), np.array([1, 3, 5], np.float32), NUM_ITEMS)
    once = Rated(Histories.from_lists([[4, 3]]), np.array([3, 5], np.float32), NUM_ITEMS)
    asked = np.array([6], np.int32)
    np.testing.assert_allclose(fitted.predict(twice, asked), fitted.predict(once, asked), atol=1e-6)


def test_the_same_seed_gives_the_same_model(fitted: RatingModel) -> None:
    data, asked, item_idx, _ = planted()
    again = fitted.config.fit(data)
    np.testing.assert_array_equal(again.predict(asked, item_idx), fitted.predict(asked, item_idx))


def test_items_outside_the_catalogue_are_refused(fitted: RatingModel) -> None:
    with pytest.raises(ModelError, match=r"outside 0\.\.23"):
        fitted.predict(strangers(1), np.array([NUM_ITEMS], np.int32))
    stranger = Rated(Histories.from_lists([[NUM_ITEMS]]), np.ones(1, np.float32), NUM_ITEMS)
    with pytest.raises(ModelError, match=r"outside 0\.\.23"):
        fitted.predict(stranger, np.zeros(1, np.int32))


def test_no_rating_is_too_few(config: RatingConfig) -> None:
    with pytest.raises(EmptyDataError, match="no rating"):
        config.fit(strangers(3))


def test_interactions_without_a_value_are_named() -> None:
    with pytest.raises(DataError, match="interaction 0 has no value"):
        RatingQuestions.of(planted_clusters(), Split.VALID)
