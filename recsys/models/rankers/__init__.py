"""Rankers: who score the candidates of one user."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recsys.errors import ModelError
from recsys.files import read_json
from recsys.kinds import Kinds
from recsys.models.rankers.base import Ranker, RankerConfig

KINDS: Kinds[RankerConfig] = Kinds(
    "rankers",
    {
        "attention": "recsys.models.rankers.attention:AttentionRankerConfig",
        "cross_encoder": "recsys.models.rankers.cross_encoder:CrossEncoderConfig",
        "causal_lm": "recsys.models.rankers.causal_lm:CausalLMConfig",
    },
)
AnyRanker = Annotated[RankerConfig, KINDS]

__all__ = ["KINDS", "AnyRanker", "Ranker", "RankerConfig", "load_ranker"]


def load_ranker(folder: str | Path) -> Ranker:
    """The ranker that :meth:`.base.Ranker.save` wrote into ``folder``, whatever its kind, in the form to be served."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no saved ranker here (config.json is missing)", path=str(folder))
    return KINDS.parse(read_json(path), where=str(path)).load(Path(folder))
