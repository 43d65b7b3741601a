"""The step ``prepare``: the configured source becomes a validated, split dataset, with the quarantine beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.artifacts import Artifact, build
from recsys.data.prepare import prepare
from recsys.files import read_json

if TYPE_CHECKING:
    from jobs.config import JobConfig


def run(config: JobConfig) -> Artifact:
    """Prepare ``config.data``; done again only where the configuration, the seed or the source's content changed."""
    settings = {
        "data": config.data.model_dump(mode="json"),
        "source_fingerprint": config.data.source.fingerprint(),
        "seed": config.seed,
    }

    def make(folder: Path) -> dict[str, Any]:
        dataset = prepare(config.data, config.seed, folder)
        return {**dataset.info.model_dump(mode="json"), **read_json(folder / "preparation.json")}

    return build(config.workdir, "prepare", settings, (), make)
