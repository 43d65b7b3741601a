"""``python -m jobs.train_ranker``: the steps up to this one; see :mod:`jobs.steps.train_ranker`."""

from __future__ import annotations

from jobs.cli import main

if __name__ == "__main__":
    main("train_ranker")
