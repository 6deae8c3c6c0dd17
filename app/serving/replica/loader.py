"""Keeps a replica up to date with the newest traffic of its model."""

import asyncio
from collections.abc import Callable

from app.errors import UserError
from app.serving.backoff import Backoff
from app.serving.logs import log
from app.serving.replica.loaded import Loaded
from app.serving.traffic import cache, traffic
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit


class Loader:
    """Loads the newest traffic, which then replaces the previous one."""

    def __init__(
        self,
        model: str,
        audit: Audit,
        load: Callable[[Traffic, Loaded | None], Loaded],
    ):
        """Load the first traffic. Raises UserError if a bundle is broken, or the variants differ in inputs.

        `load` opens a traffic. Its second argument is the previous one, whose bundles it may reuse.
        """
        self._model = model
        self._audit = audit
        self._load = load
        self.fault: str | None
        """Reason why the newest traffic is not loaded, or may not be; None if it is."""
        self.entry, first, self.fault = cache.read_with_fallback(audit, model)
        self.loaded = load(first, None)
        """Traffic that the replica answers with; `entry` is its number in the audit log."""
        self._failed_entry = 0
        """Number of the newest entry that could not be loaded."""
        self._backoff = Backoff()
        self._loading = asyncio.Lock()
        cache.store(model, self.entry, first)

    async def update(self, retry_now: bool = False) -> bool:
        """Load the newest traffic, if it is not loaded yet; returns whether this call loaded it.

        The replica answers with the previous traffic until then. If loading fails, the reason is logged and
        kept in `fault`; later calls try the entry again after a delay, or at once if `retry_now`.
        """
        async with self._loading:  # two updates at once could end in the wrong order
            number = self.entry
            try:
                current = await asyncio.to_thread(traffic.read_current, self._audit, self._model)
                if current is None or current.number == self.entry:
                    self.fault = None
                    return False
                if current.number < self.entry:  # a restored backup
                    raise UserError(
                        f"the audit log ends before entry {self.entry}, which this replica serves"
                    )
                number = current.number
                if number == self._failed_entry and not (retry_now or self._backoff.due()):
                    return False
                loaded = await asyncio.to_thread(self._load, current.traffic, self.loaded)
            except Exception as error:
                self._fail(number, error)
                return False
            self.loaded, self.entry, self.fault = loaded, number, None
            self._backoff.succeeded()
            await asyncio.to_thread(cache.store, self._model, number, current.traffic)
            return True

    def _fail(self, number: int, error: Exception) -> None:
        """Keep the reason why an entry could not be loaded, and log it once."""
        is_expected = isinstance(error, UserError)
        reason = str(error) if is_expected else f"{type(error).__name__}: {str(error)[:500]}"
        if reason != self.fault:
            log.error(
                "the newest traffic of %s is not loaded: %s", self._model, reason, exc_info=not is_expected
            )
        self.fault, self._failed_entry = reason, number
        self._backoff.failed()
