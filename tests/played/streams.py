"""Streams and events of the played GPU: the order of operations, and when each is done.

Operations are numbered, whatever stream they are in. A stream, an event and the host each know up to which
number of every stream they come after; any other operation may still be running.
"""

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.played.gpu import PlayedGpu

Order = Counter[str]  # stream -> the tick up to which something comes after it
PLAYING: "list[PlayedGpu]" = []  # the one that is played now, last
_names = itertools.count(1)
_ticks = itertools.count(1)  # over all GPUs: streams that the program keeps see more than one


def playing() -> "PlayedGpu":
    """Give the current played GPU; the program may keep streams of an earlier one."""
    return PLAYING[-1]


def join(into: Order, other: Order) -> None:
    """Order everything after ``into`` also after ``other``."""
    for name, tick in other.items():
        into[name] = max(into[name], tick)


class Stream:
    """Replaces ``torch.cuda.Stream``."""

    def __init__(self, device: torch.device, name: str | None = None) -> None:
        self.device = device
        self.name = name or f"stream {next(_names)}"  # of its own, whatever GPU is played after this one
        self.after = Order()
        self.tick = 0  # of its last operation
        self.until = 0.0  # when what it has been given is done

    def advance(self) -> int:
        """Give the next operation its number."""
        self.tick = next(_ticks)
        return self.tick

    def now(self) -> Order:
        """Give the order of the stream's next operation: all that comes before it."""
        order = Order(self.after)
        order[self.name] = max(order[self.name], self.tick)
        return order

    def wait_stream(self, other: "Stream") -> None:
        join(self.after, other.now())
        self.until = max(self.until, other.until)

    def wait_event(self, event: "Event") -> None:
        join(self.after, event.order)
        self.until = max(self.until, event.until)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.order, event.until = self.now(), self.until
        return event

    def synchronize(self) -> None:
        playing().host_waits("stream.synchronize", self.now(), self.until)

    def query(self) -> bool:
        return playing().has_reached(self.now(), self.until)


class Event:
    """Replaces ``torch.cuda.Event``."""

    def __init__(self, *_: object, **__: object) -> None:
        self.order = Order()
        self.until = 0.0

    def record(self, stream: Stream | None = None) -> None:
        (stream or playing().current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or playing().current).wait_event(self)

    def synchronize(self) -> None:
        if self.order:  # an event that was never recorded is done
            playing().host_waits("event.synchronize", self.order, self.until)

    def query(self) -> bool:
        return playing().has_reached(self.order, self.until)
