"""``python -m jobs.recommend``: the steps up to this one; see :mod:`jobs.steps.recommend`."""

from __future__ import annotations

from jobs.cli import main

if __name__ == "__main__":
    main("recommend")
