"""Says when each job of the queue starts and ends at its place in it."""

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


def lay_out(takes: Iterable[float | None], now: datetime, *, paused: bool) -> list[Place]:
    """Place jobs one behind the other: each takes so many seconds.

    None: nobody knows how long, so nothing behind it has a time either. ``PASSED_OVER``: it has no place
    and delays nobody. While paused no time is known.

    >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> [place.ends_at for place in lay_out([60.0, 90.0], noon, paused=False)]
    ['2026-01-01T12:01:00Z', '2026-01-01T12:02:30Z']
    """
    places = []
    at: datetime | None = None if paused else now
    for seconds in takes:
        if seconds == PASSED_OVER or at is None:
            places.append(UNKNOWN)
        elif seconds is None:
            places.append(Place(_text(at)))
            at = None
        else:
            end = at + timedelta(seconds=seconds)
            places.append(Place(_text(at), _text(end)))
            at = end
    return places


def _text(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
