"""Measurements; each module has ``rows()`` and runs by itself: ``python -m benchmarks.NAME``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure of ours and the baseline's, from the same run."""

    name: str
    ours: float
    baseline: float | None
    unit: str
    proves: str
    good: bool | None = None  # whether it is as it must be; None where that has no answer
