"""``python -m jobs.embed``: the steps up to this one; see :mod:`jobs.steps.embed`."""

from __future__ import annotations

from jobs.cli import main

if __name__ == "__main__":
    main("embed")
