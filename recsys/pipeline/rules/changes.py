"""Rules that are changed while Bundles answer: what people are told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from recsys.bundle.rule_log import RuleChange, RuleLog
from recsys.errors import ConfigError
from recsys.pipeline.rules import KINDS, RuleConfig

if TYPE_CHECKING:
    from recsys.data.catalogue import Catalogue

SHOWN_CHANGES = 20
RuleState: TypeAlias = Literal["holds", "comes", "over", "unusable"]


@dataclass(frozen=True, slots=True)
class RuleHistory:
    """The rules of one version, and how they came about."""

    version: int
    """0: those of the Bundle, which nobody has changed"""
    rules: tuple[Mapping[str, Any], ...]
    """plain values, in order"""
    states: tuple[RuleState, ...]
    """of each"""
    changes: tuple[RuleChange, ...]
    """the newest of all, the last one first"""


def rule_history(
    log: RuleLog | None, own: Sequence[RuleConfig], now_ms: int, version: int | None = None
) -> RuleHistory | None:
    """What ``log`` holds, at ``version`` or at its last one; ``own`` are the Bundle's rules, and all that there is
    without a log. None for a version that is not kept.

    :raises BundleCorruptError: when a change cannot be read.
    """
    kept = [] if log is None else sorted(log.versions(), reverse=True)
    version = max(kept, default=0) if version is None else version
    if version and version not in kept:
        return None
    newest = kept[:SHOWN_CHANGES]
    read: dict[int, RuleChange] = {}
    if log is not None:
        read = {each: log.read(each) for each in {*newest, version} if each}
    changed = read[version].rules if version else None
    trees = tuple(plain(own)) if changed is None else changed
    states: list[RuleState] = [state_of(tree, now_ms) for tree in trees]
    return RuleHistory(version, trees, tuple(states), tuple(read[each] for each in newest))


def plain(rules: Sequence[RuleConfig]) -> list[dict[str, Any]]:
    """As a log keeps them and people write them."""
    trees = [rule.model_dump(mode="json") for rule in rules]
    for tree in trees:  # no period is no news
        for end in ("starts_at", "ends_at"):
            if tree[end] is None:
                del tree[end]
    return trees


def state_of(tree: Mapping[str, Any], now_ms: int) -> RuleState:
    """Whether a rule holds at a time (milliseconds since 1970 UTC); one that this library does not know is unusable."""
    try:
        start_ms, end_ms = KINDS.parse(tree, where="rule").period_ms
    except ConfigError:
        return "unusable"
    if now_ms < start_ms:
        return "comes"
    return "holds" if now_ms < end_ms else "over"


def unknown_names(rules: Sequence[RuleConfig], catalogue: Catalogue) -> tuple[list[str], list[str]]:
    """Items and categories that rules speak of and that ``catalogue`` lacks, each once."""
    found = [rule.unknown(catalogue) for rule in rules]
    items, categories = ([name for each in found for name in each[place]] for place in (0, 1))
    return list(dict.fromkeys(items)), list(dict.fromkeys(categories))
