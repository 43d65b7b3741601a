"""The step ``prepare``: the configured source becomes a validated, split dataset, with the quarantine beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.artifacts import Prepared
from jobs.config import JobConfig
from jobs.steps.base import Step
from recsys.data.prepare import REPORT_FILE, prepare
from recsys.files import read_json


def run(config: JobConfig) -> Prepared:
    """Prepare ``config.data``; done again only where the configuration, the seed or the source's content changed."""
    settings = {
        "data": config.data.model_dump(mode="json"),
        "source_fingerprint": config.data.source.fingerprint(),
        "seed": config.seed,
    }

    def make(folder: Path) -> dict[str, Any]:
        dataset = prepare(config.data, config.seed, folder)
        return {**dataset.info.model_dump(mode="json"), **read_json(folder / REPORT_FILE)}

    return STEP.build(config, settings, (), make)


STEP = Step("prepare", "Validate, quarantine, index, order and split the interactions.", Prepared, run, section="data")
