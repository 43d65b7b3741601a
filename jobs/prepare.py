"""``python -m jobs.prepare``: the steps up to this one; see :mod:`jobs.steps.prepare`."""

from __future__ import annotations

from jobs.cli import main

if __name__ == "__main__":
    main("prepare")
