"""Reranking rules, one file per kind. Hard rules are something else: nobody can configure them away."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from recsys.kinds import Kinds
from recsys.pipeline.rules.base import Resolved, Rule, RuleConfig, RuleItems
from recsys.pipeline.rules.draft import Draft

KINDS: Kinds[RuleConfig] = Kinds(
    "rules",
    {
        "pin": "recsys.pipeline.rules.pin:PinRule",
        "boost": "recsys.pipeline.rules.boost:BoostRule",
        "bury": "recsys.pipeline.rules.bury:BuryRule",
        "creator_cap": "recsys.pipeline.rules.creator_cap:CreatorCapRule",
        "diversity": "recsys.pipeline.rules.diversity:DiversityRule",
        "exploration": "recsys.pipeline.rules.exploration:ExplorationRule",
    },
)
AnyRule = Annotated[RuleConfig, KINDS]
MAX_RULES = 200
"""in one list: each costs every request some microseconds"""
AnyRules = Annotated[tuple[AnyRule, ...], Field(max_length=MAX_RULES)]

__all__ = ["KINDS", "MAX_RULES", "AnyRule", "AnyRules", "Draft", "Resolved", "Rule", "RuleConfig", "RuleItems"]
