"""Models, a room of kinds each: retrievers find candidates, rankers order them, rating models foretell a rating.

:mod:`~recsys.models.base` says what a retriever is, :mod:`~recsys.models.layers` and :mod:`~recsys.models.text` hold
what several share, and :mod:`~recsys.models.extended` adds the items that a fitted model does not know.
"""
