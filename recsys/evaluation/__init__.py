"""Judging systems: metrics, protocols with leak checks, intervals over users, reports.

::

    results = [evaluate_ranker(name, rank_fn, dataset.targets(Split.TEST), dataset, config) for name, rank_fn in ...]
    report = build_report(results, dataset, Split.TEST, config, baselines=["popularity", "item_knn"])
    report.print()
    report.save(folder)
"""
