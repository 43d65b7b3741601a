"""Which kinds have a contract test."""

from __future__ import annotations


def configured_kinds(contract: type) -> set[type]:
    """The classes of ``config`` of all that inherit from ``contract``, near or far."""
    children = contract.__subclasses__()
    own = {type(child.config) for child in children if "config" in vars(child)}
    return own.union(*map(configured_kinds, children))
