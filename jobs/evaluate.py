"""``python -m jobs.evaluate``: the steps up to this one; see :mod:`jobs.steps.evaluate`."""

from __future__ import annotations

from jobs.cli import main

if __name__ == "__main__":
    main("evaluate")
