"""From a raw log of interactions and a catalogue to a prepared :class:`~recsys.data.dataset.Dataset`.

:mod:`~recsys.data.sources` read, :mod:`~recsys.data.validation` sorts good rows from bad ones,
:mod:`~recsys.data.positives` says what counts, :mod:`~recsys.data.splits` cuts, and
:func:`recsys.data.prepare.prepare` does all of it in one go.
"""
