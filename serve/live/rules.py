"""Changes of the reranking rules: what admins set goes into the rule log of the store of Bundles."""

from __future__ import annotations

import time
from collections.abc import Sequence

from recsys.bundle.rule_log import RuleLog
from recsys.errors import ChangeConflictError, ConfigError, RequestError
from recsys.pipeline.rules import RuleConfig
from recsys.pipeline.rules.changes import RuleHistory, plain, rule_history
from serve.live.service import Service
from serve.live.turns import Turns


class RuleChanges:
    """Reads and writes in threads: the store may be far away."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._turns = Turns("calls about rules wait", "rules")

    async def history(self, version: int | None) -> RuleHistory | None:
        """See :func:`recsys.pipeline.rules.changes.rule_history`.

        :raises StageOverloadedError: when too many wait already.
        """
        service = self._service
        own, now_ms = service.current.own_rules, time.time_ns() // 1_000_000
        return await self._turns.run(lambda: rule_history(service.rules, own, now_ms, version))

    async def put(self, rules: Sequence[RuleConfig] | None, *, after: int | None, by: str, note: str | None) -> int:
        """Let ``rules`` (None: those of the Bundle) follow on version ``after`` (None: on the last one, whichever that
        is); durable when it returns. The version that has them.

        :raises ChangeConflictError: when another version is the last one.
        :raises RequestError: when they are too large.
        :raises BundleError: when they cannot be written.
        :raises StageOverloadedError: when too many wait already.
        """
        trees = None if rules is None else plain(rules)

        def write() -> int:
            log = self._log()
            while True:
                try:
                    return log.append(trees, after=log.version() if after is None else after, by=by, note=note).version
                except ChangeConflictError:
                    if after is not None:
                        raise

        try:
            return await self._turns.run(write)
        except ConfigError as error:
            raise RequestError(error.message, field="rules") from error

    def _log(self) -> RuleLog:
        assert self._service.rules is not None, "routes ask first"
        return self._service.rules
