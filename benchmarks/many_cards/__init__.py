"""A daemon with many cards that only send what workers say: how much of that one front can carry.

The daemon's loop, its supervisors, SQLite, the deliveries and the pipes are real (:mod:`.daemon`). One other
process plays all cards (:mod:`.cards`): none computes or writes a checkpoint, each says at its pace that a
step is done.
"""

import statistics
from dataclasses import dataclass

STEPS = 25  # of a section


@dataclass(frozen=True)
class Asked:
    """What one measurement is of."""

    folder: str  # to work in
    cards: int
    pace: float  # seconds a step; 0: as fast as it goes
    status: bool  # it is asked once a second
    seconds: float  # of the measurement, once all cards run
    queued: int  # jobs behind those that run


@dataclass
class Found:
    """What one measurement has found; all "a second" are means over it."""

    steps: float = 0.0  # recorded a second
    messages: float = 0.0  # the same, of all kinds
    commits: float = 0.0  # a second
    cpu: float = 0.0  # of one core, as a share
    memory: float = 0.0  # MiB, resident
    delays: tuple[float, float] = (0.0, 0.0)  # seconds from sent to recorded: median, 99 %
    idle: tuple[float, float] = (0.0, 0.0)  # seconds from a job's last message to the next job, the same
    status: float = 0.0  # seconds until the status is answered, median


def quantiles(values: list[float]) -> tuple[float, float]:
    """Give the median and what 99 % are below; 0 of none."""
    if len(values) < 2:
        return (values or [0.0])[0], (values or [0.0])[0]
    return statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]
