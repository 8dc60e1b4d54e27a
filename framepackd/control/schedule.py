"""Says when each job of the queue starts and ends at its place in it."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


@dataclass(frozen=True)
class Place:
    """When a job starts and ends, in UTC; None where that cannot be known."""

    starts_at: str | None = None
    ends_at: str | None = None


UNKNOWN = Place()
PASSED_OVER = -1.0  # what a job takes that has no place in the queue now


def lay_out(takes: Iterable[float | None], now: datetime, *, paused: bool, devices: int = 1) -> list[Place]:
    """Place jobs in their order, each on the device that is free first; each takes so many seconds.

    None: nobody knows how long, so nothing that starts later has a time either. ``PASSED_OVER``: it has no
    place and delays nobody. While paused no time is known.

    >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> [place.ends_at for place in lay_out([60.0, 90.0], noon, paused=False)]
    ['2026-01-01T12:01:00Z', '2026-01-01T12:02:30Z']
    >>> [place.ends_at for place in lay_out([60.0, 90.0, 10.0], noon, paused=False, devices=2)]
    ['2026-01-01T12:01:00Z', '2026-01-01T12:01:30Z', '2026-01-01T12:01:10Z']
    """
    places = []
    free: list[datetime] = [] if paused else [now] * devices  # when each device is, the earliest first
    for seconds in takes:
        if len(free) < devices and any(at > now for at in free[:1]):
            free = []  # the device of which nobody knows may be free sooner
        if seconds == PASSED_OVER or not free:
            places.append(UNKNOWN)
        elif seconds is None:
            places.append(Place(_text(heapq.heappop(free))))
        else:
            end = free[0] + timedelta(seconds=seconds)
            places.append(Place(_text(free[0]), _text(end)))
            heapq.heapreplace(free, end)
    return places


def span(takes: Iterable[float], devices: int) -> float:
    """Give the seconds after which so many devices have done all jobs, started in their order.

    >>> span([60.0, 90.0, 10.0], 2)
    90.0
    """
    free = [0.0] * devices
    for seconds in takes:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _text(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
