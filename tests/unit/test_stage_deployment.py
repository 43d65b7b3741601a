"""A stage's replica without Ray: what it answers, and whom it answers with an error."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from recsys.errors import StageError
from recsys.pipeline.build import Parts, build_stage
from recsys.pipeline.config import pipeline_config
from recsys.testing.pipeline import make_query
from recsys.testing.tiny_bundle import make_bundle
from recsys.types import Candidates, History
from serve.config import StageConfig
from serve.graph.deployments import RemoteStage, StageDeployment
from serve.graph.frames import pack_call, unpack_output
from serve.live.shelf import StageInfo


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def retrieval(bundle):
    return StageDeployment("retrieval", str(bundle.path), StageConfig(threads=1).model_dump(mode="json"))


def ask(stage, *queries):
    async def all_at_once():
        calls = (stage.run(pack_call(query, Candidates.empty())) for query in queries)
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(all_at_once())


def test_a_batch_answers_each_call_as_it_would_alone(bundle, retrieval):
    queries = [
        make_query(bundle_id=bundle.bundle_id, history=[item])
        for item in (1, 5)
    ]  # fmt: skip
    together = [unpack_output(frame) for frame in ask(retrieval, *queries)]
    alone = [unpack_output(ask(retrieval, query)[0]) for query in queries]
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.candidates.item_idx, theirs.candidates.item_idx)
        assert ours.bundle_id == bundle.bundle_id


def test_calls_for_several_bundles_share_a_batch(bundle, retrieval, tmp_path):
    other = make_bundle(tmp_path, seed=1)
    stage = build_stage("retrieval", Parts.of_bundle(other), pipeline_config(other))
    retrieval._shelf._stages[other.bundle_id] = stage
    sizes = []
    for stage in retrieval._shelf.stages:
        stage.run_batch = counted(stage.run_batch, sizes)
    queries = [make_query(bundle_id=each.bundle_id) for each in (bundle, other, bundle, bundle, other)]
    answers = [unpack_output(frame) for frame in ask(retrieval, *queries)]
    assert [answer.bundle_id for answer in answers] == [query.bundle_id for query in queries]
    assert sorted(sizes) == [2, 3]


def counted(run_batch, sizes):
    def run(queries, candidates):
        sizes.append(len(queries))
        return run_batch(queries, candidates)

    return run


class Handle:
    """A handle of Ray whose replicas answer ``answers``, or that has none."""

    def __init__(self, answers):
        self.answers = answers

    def options(self, **_):
        return self

    def broadcast(self, *_):
        return self

    async def results_async(self, *, return_exceptions):
        assert return_exceptions
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


@pytest.mark.parametrize(
    ("answers", "states"),
    [
        (DeploymentUnavailableError(None), []),
        ([{"b": StageInfo("ranking", "b", "ready")}, RayActorError()], ["ready", "loading"]),
    ],
)
def test_replicas_that_do_not_answer_are_not_ready(answers, states):
    found = asyncio.run(RemoteStage("ranking", Handle(answers)).hold(["b"]))
    assert [info["b"].state for info in found] == states


def test_a_call_that_cannot_be_answered_takes_no_other_with_it(bundle, retrieval):
    good = make_query(bundle_id=bundle.bundle_id)
    other_bundle = replace(good, bundle_id="another")
    beyond = replace(good, history=History(np.array([10**6], np.int32), np.zeros(1, np.int64)))
    first, wrong, unusable, last = ask(retrieval, good, other_bundle, beyond, good)
    assert len(unpack_output(first).candidates) and len(unpack_output(last).candidates)
    assert isinstance(wrong, StageError) and "does not serve Bundle another" in str(wrong)
    assert isinstance(unusable, Exception)


def test_a_frame_of_another_version_is_an_error_for_its_sender_alone(bundle, retrieval):
    async def both():
        good = pack_call(make_query(bundle_id=bundle.bundle_id), Candidates.empty())
        return await asyncio.gather(retrieval.run(good), retrieval.run(good[:-1]), return_exceptions=True)

    good, odd = asyncio.run(both())
    assert len(unpack_output(good).candidates)
    assert isinstance(odd, ValueError)


def test_a_replica_is_asked_for_its_health_where_it_computes():
    """Serve asks a loop of its own unless the class has a coroutine of this name."""
    assert inspect.iscoroutinefunction(StageDeployment.check_health)
