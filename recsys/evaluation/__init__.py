"""Judging systems: metrics, protocols with leak checks, intervals over users, reports.

::

    results = [evaluate_ranker(name, rank_fn, dataset.targets(Split.TEST), dataset, config) for name, rank_fn in ...]
    report = build_report(results, dataset, Split.TEST, config, baselines=["popularity", "item_knn"])
    report.print()
    report.save(folder)
"""

from recsys.evaluation.protocol import (
    EvaluationConfig,
    RankFn,
    SystemResult,
    check_no_leak,
    evaluate_ranker,
    rank_scores,
    retriever_ranker,
    sample_queries,
)
from recsys.evaluation.report import EvaluationReport, build_report
from recsys.evaluation.significance import Difference, Interval, bootstrap, paired_difference

__all__ = [
    "Difference",
    "EvaluationConfig",
    "EvaluationReport",
    "Interval",
    "RankFn",
    "SystemResult",
    "bootstrap",
    "build_report",
    "check_no_leak",
    "evaluate_ranker",
    "paired_difference",
    "rank_scores",
    "retriever_ranker",
    "sample_queries",
]
