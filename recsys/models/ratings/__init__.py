"""Models that foretell the rating itself, one file per family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recsys.errors import ModelError
from recsys.files import read_json
from recsys.kinds import Kinds
from recsys.models.ratings.base import RatingConfig, RatingModel

KINDS: Kinds[RatingConfig] = Kinds(
    "ratings",
    {
        "biases": "recsys.models.ratings.biases:Biases",
        "neighbours": "recsys.models.ratings.neighbours:Neighbours",
        "factors": "recsys.models.ratings.factors:Factors",
    },
)
AnyRatingModel = Annotated[RatingConfig, KINDS]

__all__ = ["KINDS", "AnyRatingModel", "RatingConfig", "RatingModel", "load_rating_model"]


def load_rating_model(folder: str | Path) -> RatingModel:
    """The model that :meth:`.base.RatingModel.save` wrote into ``folder``, whatever its kind."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no saved rating model here (config.json is missing)", path=str(folder))
    return KINDS.parse(read_json(path), where=str(path)).load(Path(folder))
