"""A store of Bundles, for whoever tests what moves between them."""

from __future__ import annotations

import pytest

from recsys.bundle.store import BundleStore
from recsys.testing.tiny_bundle import make_bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Three that differ."""
    folder = tmp_path_factory.mktemp("bundles")
    return [make_bundle(folder, seed=seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path, bundles):
    """Holds all three; the first is current."""
    store = BundleStore(tmp_path / "store")
    for bundle in bundles:
        store.add(bundle)
    store.activate(bundles[0].bundle_id, None)
    return store
