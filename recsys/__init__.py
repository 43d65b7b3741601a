"""Real-time recommendations from large models: training, evaluation and serving as a plain Python library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys.pipeline.recommender import Recommender

__all__ = ["Recommender"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing the package alone must not load torch and FAISS.
    if name == "Recommender":
        from recsys.pipeline.recommender import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
