"""What is popular: what newcomers are shown, and everybody when all else fails."""

from __future__ import annotations

import numpy as np

from recsys.data.dataset import Dataset, Split
from recsys.models.base import FitData
from recsys.pipeline.bundle_config import BundleConfig
from recsys.training.runtime import Runtime


def popular(config: BundleConfig, dataset: Dataset, until: Split = Split.TEST) -> tuple[np.ndarray, np.ndarray]:
    """The most popular items up to and with ``until``, best first: int32 [P] and float32 [P]."""
    fitted = config.popular.fit(FitData.of(dataset, until, seed=config.seed), Runtime("cpu"))
    scores = fitted.score(dataset.positives.histories(until)[:1])[0]
    best = np.argsort(-scores, kind="stable")[: config.num_popular]
    best = best[scores[best] > 0]
    return best.astype(np.int32), scores[best].astype(np.float32)
