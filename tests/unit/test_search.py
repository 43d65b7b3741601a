"""Items by words: the same encoder for the query and for what is found."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from recsys.errors import RequestError
from recsys.models.text.encoder import TextEncoderConfig
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.pipeline.recommender import Recommender
from recsys.pipeline.requests import SearchRequest
from recsys.testing.tiny_bundle import NUM_ITEMS, make_bundle
from recsys.types import Filters

WORDS = ["red", "green", "blue", "apple", "train", "river", "night", "ride"]
TEXTS = [f"{first} {second}" for first in WORDS for second in WORDS if first != second]


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    """A Bundle whose items ``i0``, ``i1``, ... have the texts above; ``i13`` is not to be had."""
    folder = tmp_path_factory.mktemp("search")
    config = TextEncoderConfig.parse({"model": str(tiny_encoder(folder / "bert", WORDS))}, where="test")
    config = config.model_copy(update={"fields": ("title",)})
    bundle = make_bundle(folder / "bundles", titles=TEXTS + ["river"] * (NUM_ITEMS - len(TEXTS)), encoder=config)
    with Recommender.load(bundle.path, inline=True) as recommender:
        yield recommender


def test_the_item_with_the_very_words_comes_first(recommender):
    for row in (0, 20, 40):
        answer = recommender.search(TEXTS[row], top_k=5)
        assert answer.items[0].item_id == f"i{row}"
        assert answer.items[0].score == pytest.approx(1, abs=1e-4)
        assert answer.scores == sorted(answer.scores, reverse=True)
        assert answer.items[0].sources == ("search",)


def test_rules_hold_for_what_is_found(recommender):
    assert "i13" not in recommender.search(TEXTS[13], top_k=50).item_ids
    request = SearchRequest(TEXTS[1], 50, Filters(categories_any=["odd"]), exclude_items=["i1", "no such"])
    found = recommender.search(request).item_ids
    assert "i1" not in found
    assert {int(item_id[1:]) % 2 for item_id in found} == {1}
    assert len(recommender.search("river", top_k=299).items) == 299


@pytest.mark.parametrize("query", ["", "  ", "x" * 1001, "\ud800", None])
def test_what_is_no_query_is_refused(recommender, query):
    with pytest.raises(RequestError, match="query"):
        recommender.search(SearchRequest(query))


def test_a_bundle_of_ids_alone_says_so(tmp_path):
    with (
        Recommender.load(make_bundle(tmp_path).path, inline=True) as recommender,
        pytest.raises(RequestError, match="knows no words"),
    ):
        recommender.search("river")


def test_threads_find_the_same(recommender):
    alone = [recommender.search(text).item_ids for text in TEXTS[:16]]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: recommender.search(text).item_ids, TEXTS[:16]))
    assert together == alone
    assert np.unique([len(items) for items in alone]).tolist() == [10]
