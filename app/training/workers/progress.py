"""Messages between the ranks and the command, through an actor.

Imports little, so that the actor starts fast.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from app.training.observer import Ending, Observer, Request

EVENTS_TIMEOUT_S = 10.0
"""Maximum time that a request for new events waits in the actor. Polling would take CPU time from the
ranks."""
RETRY_S = 1.0
"""Pause before events are requested again after a failure."""


@ray.remote(num_cpus=0)
class _Progress:
    """Stores the events that rank 0 reports, on any node, and the requests to the ranks."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._requests: list[Request] = []
        self._changed = asyncio.Condition()

    async def report(self, kind: str, content: Any) -> None:
        async with self._changed:
            self._events.append((kind, content))
            self._changed.notify_all()

    async def events(self, start: int, timeout_s: float) -> list[tuple[str, Any]]:
        """The events after the first `start`, as soon as there is one; none after `timeout_s` seconds."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                new = self._changed.wait_for(lambda: len(self._events) > start)
                await asyncio.wait_for(new, timeout_s)
        return self._events[start:]

    async def request(self, request: Request) -> None:
        """Pass a request to the ranks."""
        async with self._changed:
            self._requests.append(request)
            self._changed.notify_all()

    async def next_request(self, start: int) -> Request:
        """The request after the first `start`, as soon as there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._requests) > start)
        return self._requests[start]

    async def num_requests(self) -> int:
        return len(self._requests)

    async def save(self) -> None:
        """Have the ranks write a checkpoint; returns when it is on disk."""
        start = len(self._events)
        await self.request(Request.SAVE)
        async with self._changed:
            await self._changed.wait_for(lambda: ("saved", None) in self._events[start:])


class Reporter(Observer):
    """Observer of a worker. Only rank 0 reports to the actor and takes requests from it."""

    def __init__(self, actor: Any, rank: int):
        self._actor = actor
        self._rank = rank
        if rank == 0:
            # Skip the requests to an earlier group of ranks, except the last, which may still be open.
            self._num_taken = max(0, ray.get(actor.num_requests.remote()) - 1)
            self._next = actor.next_request.remote(self._num_taken)

    def epoch(self, metrics: dict[str, float]) -> None:
        self._report("epoch", metrics)

    def note(self, text: str) -> None:
        self._report("note", text)

    def saved(self) -> None:
        self._report("saved", None)

    def end(self, ending: Ending) -> None:
        """Report the end. Waits until the actor has it, because this process may end next."""
        if self._rank == 0:
            ray.get(self._actor.report.remote("end", ending))

    def request(self) -> Request:
        if self._rank == 0 and ray.wait([self._next], timeout=0)[0]:
            request = ray.get(self._next)
            self._num_taken += 1
            self._next = self._actor.next_request.remote(self._num_taken)
            return request
        # Ray sets this when a node of the group is about to be taken away.
        is_leaving = get_train_context().preemption_context.preemption_info is not None
        return Request.MOVE if is_leaving else Request.NONE

    def _report(self, kind: str, content: Any) -> None:
        if self._rank == 0:
            self._actor.report.remote(kind, content)


class Listener:
    """The command's side: owns the actor and passes its events to callbacks."""

    def __init__(self, on_epoch: Callable[[dict[str, float]], None], on_note: Callable[[str], None]):
        # On this node, so that the training does not depend on one more node.
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = _Progress.options(scheduling_strategy=this_node).remote()  # type: ignore[attr-defined]
        self._handlers: dict[str, Callable[[Any], None]] = {
            "epoch": on_epoch,
            "note": on_note,
            "end": self._on_end,
            "running": self._on_running,
            "not called": self._on_not_called,
        }
        self._ending: Ending | None = None
        self._is_running = False
        self._not_called = ["Transitions.after_worker_group_start"]
        self._num_handled = 0
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Request a checkpoint and the end of the training."""
        self.actor.request.remote(Request.STOP)

    def ending(self) -> Ending | None:
        """How the ranks ended; None if they have not."""
        self.handle_events()
        return self._ending

    def is_waiting(self) -> bool:
        """Whether no ranks are running that could write a checkpoint, and none have ended."""
        self.handle_events()
        return not self._is_running and not self._ending

    def not_called(self) -> list[str]:
        """Names of the overrides that Ray has not called in the controller, see `overrides`.

        If the controller has sent no report, it is the callback that sends the report that was not called.
        """
        self.handle_events()
        return self._not_called

    def handle_events(self, timeout_s: float = 0.0) -> None:
        """Pass new events to the callbacks; waits up to `timeout_s` for one."""
        start = self._num_handled
        events = ray.get(self.actor.events.remote(start, timeout_s))
        with self._lock:  # another thread may have handled some of them meanwhile
            for kind, content in events[self._num_handled - start :]:
                self._num_handled += 1
                if kind not in self._handlers:  # "saved": `_Progress.save` waits for it
                    continue
                try:
                    self._handlers[kind](content)
                except Exception:  # a callback must not end the training; the history has the epoch anyway
                    logging.getLogger(__name__).exception("the callback failed for: %s %s", kind, content)

    def _on_running(self, is_running: bool) -> None:
        self._is_running = is_running

    def _on_not_called(self, names: list[str]) -> None:
        self._not_called = names

    def _on_end(self, ending: Ending) -> None:
        self._ending = ending


@contextmanager
def listening(
    on_epoch: Callable[[dict[str, float]], None], on_note: Callable[[str], None]
) -> Iterator[Listener]:
    """Start a listener, and a thread that handles its events until the block ends."""
    listener = Listener(on_epoch, on_note)
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            try:
                listener.handle_events(EVENTS_TIMEOUT_S)
            except ray.exceptions.RayActorError:
                return  # the actor was killed below, or its node is gone and the training with it
            except Exception:  # for example while Ray's control store restarts
                logging.getLogger(__name__).exception("cannot get the training's events; trying again")
                done.wait(RETRY_S)

    thread = threading.Thread(target=listen, name="progress", daemon=True)
    thread.start()
    try:
        yield listener
        listener.handle_events()
    finally:
        done.set()
        ray.kill(listener.actor)
        thread.join()
