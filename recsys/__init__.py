"""Real-time recommendations from large models: training, evaluation and serving as a plain Python library.

``docs/api.md`` says which of these names are stable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys.bundle import Bundle, BundleStore
    from recsys.config import StrictConfig, load_config
    from recsys.data.config import DataConfig
    from recsys.data.dataset import Dataset, Split
    from recsys.data.histories import Histories
    from recsys.data.prepare import prepare
    from recsys.data.sources.base import Source
    from recsys.data.splits.base import SplitPolicy
    from recsys.errors import (
        BundleCorruptError,
        BundleError,
        BundleMismatchError,
        BundleNotFoundError,
        ChangeConflictError,
        ConfigError,
        DataError,
        EmptyDataError,
        EventStoreError,
        LeakageError,
        ModelError,
        NoTimeError,
        NotInstalledError,
        PointerConflictError,
        RecsysError,
        RequestError,
        SchemaError,
        StageError,
        StageOverloadedError,
        StageSkippedError,
        StageTimeoutError,
    )
    from recsys.events.base import Event, EventLog, EventLogConfig, EventStore, EventStoreConfig, UserState
    from recsys.index.base import IndexConfig, VectorIndex
    from recsys.kinds import Kind
    from recsys.models.base import FitData, Retriever, RetrieverConfig, VectorRetriever
    from recsys.models.rankers.base import Ranker, RankerConfig
    from recsys.models.ratings.base import RatingConfig, RatingModel
    from recsys.pipeline.config import PipelineConfig
    from recsys.pipeline.recommender import Recommender
    from recsys.pipeline.requests import (
        Recommendation,
        RecommendedItem,
        RecommendRequest,
        SearchRequest,
        SimilarRequest,
    )
    from recsys.pipeline.rules.base import Rule, RuleConfig
    from recsys.training.runtime import Runtime
    from recsys.types import Filters, HistoryItem

__all__ = [
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "BundleMismatchError",
    "BundleNotFoundError",
    "BundleStore",
    "ChangeConflictError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Dataset",
    "EmptyDataError",
    "Event",
    "EventLog",
    "EventLogConfig",
    "EventStore",
    "EventStoreConfig",
    "EventStoreError",
    "Filters",
    "FitData",
    "Histories",
    "HistoryItem",
    "IndexConfig",
    "Kind",
    "LeakageError",
    "ModelError",
    "NoTimeError",
    "NotInstalledError",
    "PipelineConfig",
    "PointerConflictError",
    "Ranker",
    "RankerConfig",
    "RatingConfig",
    "RatingModel",
    "RecommendRequest",
    "Recommendation",
    "RecommendedItem",
    "Recommender",
    "RecsysError",
    "RequestError",
    "Retriever",
    "RetrieverConfig",
    "Rule",
    "RuleConfig",
    "Runtime",
    "SchemaError",
    "SearchRequest",
    "SimilarRequest",
    "Source",
    "Split",
    "SplitPolicy",
    "StageError",
    "StageOverloadedError",
    "StageSkippedError",
    "StageTimeoutError",
    "StrictConfig",
    "UserState",
    "VectorIndex",
    "VectorRetriever",
    "load_config",
    "prepare",
]

_DISTRIBUTION = "recsys-ray"
"""under which this package is installed: the name in ``pyproject.toml``"""

# Where each name is at home; those that are not listed are errors.
_HOMES = {
    "recsys.bundle": ("Bundle", "BundleStore"),
    "recsys.config": ("StrictConfig", "load_config"),
    "recsys.data.config": ("DataConfig",),
    "recsys.data.dataset": ("Dataset", "Split"),
    "recsys.data.histories": ("Histories",),
    "recsys.data.prepare": ("prepare",),
    "recsys.data.sources.base": ("Source",),
    "recsys.data.splits.base": ("SplitPolicy",),
    "recsys.events.base": ("Event", "EventLog", "EventLogConfig", "EventStore", "EventStoreConfig", "UserState"),
    "recsys.index.base": ("IndexConfig", "VectorIndex"),
    "recsys.kinds": ("Kind",),
    "recsys.models.base": ("FitData", "Retriever", "RetrieverConfig", "VectorRetriever"),
    "recsys.models.rankers.base": ("Ranker", "RankerConfig"),
    "recsys.models.ratings.base": ("RatingConfig", "RatingModel"),
    "recsys.pipeline.config": ("PipelineConfig",),
    "recsys.pipeline.recommender": ("Recommender",),
    "recsys.pipeline.requests": (
        "Recommendation",
        "RecommendRequest",
        "RecommendedItem",
        "SearchRequest",
        "SimilarRequest",
    ),
    "recsys.pipeline.rules.base": ("Rule", "RuleConfig"),
    "recsys.training.runtime": ("Runtime",),
    "recsys.types": ("Filters", "HistoryItem"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing the package alone must not load torch and FAISS.
    from importlib import import_module

    if name == "__version__":
        value: Any = _version()
    elif name in __all__:
        value = getattr(import_module(_HOME_OF.get(name, "recsys.errors")), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    """Of the installed distribution; ``unknown`` where the package is imported from a folder that is not installed."""
    from importlib import metadata

    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
