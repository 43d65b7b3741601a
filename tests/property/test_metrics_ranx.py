"""The accuracy metrics agree with ranx, query by query, on random rankings and relevance.

ranx runs in a process of its own, uncompiled: its compilation takes minutes and its arithmetic is the same without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

from recsys.evaluation import metrics

KS = (1, 5, 10, 20)
NAMES = {"recall": "recall", "ndcg": "ndcg", "mrr": "mrr", "hr": "hit_rate"}

RANX = """
import json, sys
import ranx
qrels, run, names = json.load(sys.stdin)
run = ranx.Run(run)
ranx.evaluate(ranx.Qrels(qrels), run, names)
json.dump({name: {q: float(x) for q, x in run.scores[name].items()} for name in names}, sys.stdout)
"""


def test_agrees_with_ranx() -> None:
    rng = np.random.default_rng(0)
    num_queries, num_items, depth = 200, 50, 20
    ranked = np.array([rng.permutation(num_items)[:depth] for _ in range(num_queries)], np.int32)
    relevant = [rng.choice(num_items, rng.integers(1, 40), replace=False) for _ in range(num_queries)]
    lengths = rng.integers(1, depth + 1, num_queries)  # some rankings run out of items
    ranked[np.arange(depth) >= lengths[:, None]] = -1
    offsets = np.cumsum([0, *map(len, relevant)]).astype(np.int64)
    ours = metrics.accuracy(ranked, np.concatenate(relevant).astype(np.int32), offsets, ks=KS, num_items=num_items)

    queries = [f"q{q}" for q in range(num_queries)]
    qrels = {q: {f"d{i}": 1 for i in items} for q, items in zip(queries, relevant, strict=True)}
    run = {q: {f"d{i}": depth - r for r, i in enumerate(row) if i >= 0} for q, row in zip(queries, ranked, strict=True)}
    asked = json.dumps([qrels, run, [f"{theirs}@{k}" for theirs in NAMES.values() for k in KS]])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RANX],
        input=asked,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )
    scores = json.loads(done.stdout)
    for name, theirs in NAMES.items():
        for k in KS:
            expected = [scores[f"{theirs}@{k}"][q] for q in queries]
            np.testing.assert_allclose(ours[f"{name}@{k}"], expected, atol=1e-12, err_msg=f"{name}@{k}")
