"""Stores of Bundles, for whoever tests what moves between them: three made-up ones, and one that jobs have trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import pipeline
from jobs.config import JobConfig
from recsys.bundle.store import BundleStore
from recsys.config import load_config
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


@pytest.fixture(scope="session")
def trained_job(tmp_path_factory):
    """The configuration of a small pipeline that has run: 100 items, item ``n`` in the ring ``n % 10``."""
    home = tmp_path_factory.mktemp("published")
    changes = [
        f"workdir={home}",
        "compute.num_workers=0",
        "data.source={kind: synthetic, num_users: 300, num_items: 100, num_clusters: 10}",
        "retriever.train.epochs=15",
        "retriever.dim=32",
        "ranking.model.epochs=3",
        "baselines=[{kind: popularity}]",
        # What is compared must be whole, however busy the machine is.
        "pipeline.deadline_ms=9000",
        "pipeline.budgets_ms={retrieval: 3000, ranking: 3000, reranking: 3000}",
    ]
    config = load_config(JobConfig, Path(__file__).resolve().parents[2] / "configs/synthetic.yaml", overrides=changes)
    pipeline.run(config)
    return config


@pytest.fixture(scope="session")
def published(trained_job):
    """The store of its one Bundle."""
    return Path(trained_job.store)
