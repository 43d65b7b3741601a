"""Models that foretell the rating itself: one file per family, its configuration's name in ``RATING_KINDS``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recsys.config import parse, union
from recsys.errors import ModelError
from recsys.files import read_json
from recsys.models.ratings.base import RatingConfig, RatingModel
from recsys.models.ratings.biases import Biases
from recsys.models.ratings.factors import Factors
from recsys.models.ratings.neighbours import Neighbours

RATING_KINDS: tuple[type[RatingConfig], ...] = (Biases, Neighbours, Factors)

if TYPE_CHECKING:
    AnyRatingModel = RatingConfig
else:
    AnyRatingModel = union("ratings", RATING_KINDS)


def load_rating_model(folder: str | Path) -> RatingModel:
    """The model that :meth:`.base.RatingModel.save` wrote into ``folder``, whatever its kind."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no saved rating model here (config.json is missing)", path=str(folder))
    config: RatingConfig = parse(AnyRatingModel, read_json(path), where=str(path))
    return config.load(Path(folder))
