"""What a Bundle answers to its golden question, before it is published."""

from __future__ import annotations

from recsys.bundle.golden import GoldenQuery, GoldenQuestion
from recsys.bundle.reader import Bundle
from recsys.pipeline.recommender import Recommender


def golden_answer(bundle: Bundle, question: GoldenQuestion) -> GoldenQuery:
    """``question`` with the answer of ``bundle``."""
    with Recommender.of(bundle) as recommender:
        slate = recommender.answer_golden(question)
    return question.answered(slate.item_ids, [item.score for item in slate.items])
