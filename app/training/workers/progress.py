"""What the ranks and the one who started them tell each other. Imports little: it is an actor."""

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

WAIT_S = 10.0
"""How long a question for news waits for some: questions without end would take CPU time from
the ranks."""


@ray.remote(num_cpus=0)
class _Progress:
    """Hears of epochs from rank 0, on whatever node that is, and passes on the wish to stop."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._wishes: list[str] = []
        self._change = asyncio.Condition()

    async def add(self, kind: str, what: Any) -> None:
        async with self._change:
            self._events.append((kind, what))
            self._change.notify_all()

    async def since(self, count: int, wait_s: float) -> list[tuple[str, Any]]:
        """The events after the first `count`, as soon as there are any, or none after `wait_s` seconds."""
        async with self._change:
            with contextlib.suppress(TimeoutError):
                news = self._change.wait_for(lambda: len(self._events) > count)
                await asyncio.wait_for(news, wait_s)
        return self._events[count:]

    async def want(self, wish: str) -> None:
        """`stop` or `save`, for the ranks."""
        async with self._change:
            self._wishes.append(wish)
            self._change.notify_all()

    async def wish(self, count: int) -> str:
        """The wish after the first `count`, as soon as there is one."""
        async with self._change:
            await self._change.wait_for(lambda: len(self._wishes) > count)
        return self._wishes[count]

    async def num_wishes(self) -> int:
        return len(self._wishes)

    async def save(self) -> None:
        """Have the ranks write a checkpoint; answers when it is on the disk."""
        count = len(self._events)
        await self.want("save")
        async with self._change:
            await self._change.wait_for(lambda: ("saved", None) in self._events[count:])


class Teller:
    """Rank 0's side: tells what happens, and hears what is wished. The other ranks' is silent and deaf."""

    look_s = 1.0
    """How often the ranks look up from their steps whether one of them has to stop or move."""

    def __init__(self, actor: Any, rank: int):
        self._actor = actor
        self._rank = rank
        if rank == 0:
            # Of the wishes to another group of ranks before this one, only the last may still stand.
            self._heard = max(0, ray.get(actor.num_wishes.remote()) - 1)
            self._wish = actor.wish.remote(self._heard)

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done; the metrics are of all ranks."""
        self._tell("epoch", metrics)

    def note(self, text: str) -> None:
        """A line for the person who waits."""
        self._tell("note", text)

    def end(self, outcome: str, **facts: Any) -> None:
        """How the training ended: `finished`, `stopped`, `moved` or `diverged`. Heard before this returns."""
        if self._rank == 0:
            ray.get(self._actor.add.remote("end", {"outcome": outcome, **facts}))

    def saved(self) -> None:
        """The checkpoint that was wished for is on the disk."""
        self._tell("saved", None)

    def wish(self) -> str:
        """A new wish, `stop` or `save`, if there is one; else empty."""
        if self._rank != 0 or not ray.wait([self._wish], timeout=0)[0]:
            return ""
        wish = ray.get(self._wish)
        self._heard += 1
        self._wish = self._actor.wish.remote(self._heard)
        return wish

    def leaving(self) -> bool:
        """Whether Ray has heard that this group's node will be taken away."""
        return get_train_context().preemption_context.preemption_info is not None

    def _tell(self, kind: str, what: Any) -> None:
        if self._rank == 0:
            self._actor.add.remote(kind, what)


class Here:
    """A teller, where the only rank trains in the process of the one who started it."""

    look_s = 0.0

    def __init__(
        self,
        on_epoch: Callable[[dict[str, float]], None],
        on_note: Callable[[str], None],
        stop: threading.Event,
    ):
        self.epoch = on_epoch
        self.note = on_note
        self.ended: dict[str, Any] = {}
        self._stop = stop

    def end(self, outcome: str, **facts: Any) -> None:
        self.ended = {"outcome": outcome, **facts}

    def saved(self) -> None:
        """Nobody wishes for it."""

    def wish(self) -> str:
        return "stop" if self._stop.is_set() else ""

    def leaving(self) -> bool:
        return False


class Listener:
    """The starter's side: an actor for the ranks, and a thread here that passes on what it hears."""

    def __init__(self, on_epoch: Callable[[dict[str, float]], None], on_note: Callable[[str], None]):
        # On this node: if it were on another, the training could not outlive that one.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = _Progress.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._hear: dict[str, Callable[[Any], None]] = {
            "epoch": on_epoch,
            "note": on_note,
            "end": self._ends,
            "runs": self._changes,
        }
        self._end: dict[str, Any] = {}
        self._runs = False
        self._count = 0
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ask the ranks to write a checkpoint and end."""
        self.actor.want.remote("stop")

    def end(self) -> dict[str, Any]:
        """What `Teller.end` said: `outcome`, and the `epoch` and `step` at which it was."""
        self._listen_once()
        return self._end

    def waits(self) -> bool:
        """Whether there are no ranks that could write a checkpoint, and none has told an end."""
        self._listen_once()
        return not self._runs and not self._end

    def _changes(self, runs: bool) -> None:
        self._runs = runs

    def _ends(self, what: dict[str, Any]) -> None:
        self._end = what

    def _listen_once(self, wait_s: float = 0.0) -> None:
        first = self._count
        events = ray.get(self.actor.since.remote(first, wait_s))
        with self._lock:  # another thread may have heard some of them meanwhile
            for kind, what in events[self._count - first :]:
                self._count += 1
                if kind not in self._hear:  # `saved` is for whoever waits in `save`
                    continue
                try:
                    self._hear[kind](what)
                except Exception:  # what is done with the news must not end the training: its history is kept
                    logging.getLogger(__name__).exception("nobody could be told of: %s %s", kind, what)


@contextmanager
def listening(
    on_epoch: Callable[[dict[str, float]], None], on_note: Callable[[str], None]
) -> Iterator[Listener]:
    """A listener for the time of the block."""
    listener = Listener(on_epoch, on_note)
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            try:
                listener._listen_once(WAIT_S)
            except ray.exceptions.RayActorError:
                return  # it is killed below, or its node is gone, and the training with it
            except Exception:  # such as a control store that starts again
                logging.getLogger(__name__).exception("the training's news are not heard; asking again")
                done.wait(1.0)

    thread = threading.Thread(target=listen, name="progress", daemon=True)
    thread.start()
    try:
        yield listener
        listener._listen_once()
    finally:
        done.set()
        ray.kill(listener.actor)
        thread.join()
