"""``python -m jobs.train_encoder``: the steps up to this one; see :mod:`jobs.steps.train_encoder`."""

from __future__ import annotations

from jobs.cli import main

if __name__ == "__main__":
    main("train_encoder")
