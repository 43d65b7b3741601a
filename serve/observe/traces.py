"""What became of one request: which source brought each item, how each stage scored it, and why others are not shown.

The newest traces lie in the memory of the gateway that answered, as the arrays they were; they are put into words when
somebody asks.
"""

from __future__ import annotations

from typing import Any

from recsys.data.catalogue import Catalogue
from recsys.pipeline.requests import Recommendation
from recsys.types import Int32Array


def describe(answer: Recommendation, catalogue: Catalogue) -> dict[str, Any]:
    """The trace of ``answer`` as plain values, in the form of :class:`serve.http.wire.TraceAnswer`."""
    slate = answer.slate
    assert slate is not None, "only recommendations are kept"

    def ids(item_idx: Int32Array) -> list[str]:
        return catalogue.id_map.take(item_idx)

    return {
        "request_id": answer.request_id,
        "bundle_id": answer.bundle_id,
        "user_id": answer.user_id,
        "now_ms": slate.query.now_ms,
        "history": ids(slate.query.history.item_idx),
        "degraded": list(answer.degraded),
        "stages": [
            {
                "stage": stage,
                "outcome": outcome,
                "bundle_id": slate.provenance.get(stage),
                "total_ms": slate.timings_ms.get(stage),
                "compute_ms": slate.busy_ms.get(stage),
                "failure": slate.failures.get(stage),
            }
            for stage, outcome in slate.outcomes.items()
        ],
        "items": [
            {
                "item_id": item.item_id,
                "rank": item.rank,
                "score": item.score,
                "sources": list(item.sources),
                "stage_scores": dict(item.stage_scores),
            }
            for item in answer.items
        ],
        "removed": [
            {"stage": each.stage, "reason": each.reason, "item_ids": ids(each.item_idx)} for each in slate.removals()
        ],
    }
