"""What to run first on a machine with a GPU, in nine minutes: ``python -m benchmarks gpu --first-light``.

The most valuable rows come first. Each has a time limit, and a row that fails, crashes or hangs does not end
the run: rows are computed in a child process, and if that dies or its CUDA context breaks, the next row gets
a new one. Results are in ``first-light.json`` (rewritten after every figure) and ``first-light.md`` of
``--out``, the libraries' output in ``first-light.log``. The exit code is 1 if a row failed.

``--tiny`` runs all of it small, on the CPU if there is no GPU; rows that need one are then skipped.

A machine that reaches no package registry needs the packages in ``benchmarks/wheels.txt`` carried to it:
:mod:`benchmarks.first_light.carry` packs and unpacks them. A row whose packages are missing is skipped.
"""

import math
from dataclasses import dataclass
from typing import Any

from benchmarks import Row


class SkippedError(Exception):
    """A row cannot be computed on this machine; the text says why."""


@dataclass(frozen=True)
class Figure:
    """A result of a row."""

    name: str
    value: float | str
    unit: str = ""
    baseline: float | None = None
    says: str = ""
    good: bool | None = None  # whether it is as it must be, where that can be said

    @classmethod
    def of(cls, row: Row) -> "Figure":
        """Give that of a benchmark."""
        return cls(row.name, row.ours, row.unit, row.baseline, row.proves, row.good)

    @property
    def as_json(self) -> dict[str, Any]:
        """Give it as JSON can hold it: what is no number is none there."""
        told = dict(vars(self))
        for name, value in told.items():
            if isinstance(value, float) and not math.isfinite(value):
                told[name] = None
        return told


@dataclass(frozen=True)
class Check:
    """A row: what computes it, and what that needs."""

    name: str
    function: str  # a module, and a function in it that yields figures or rows of a benchmark
    seconds: float  # that it is likely to take on a fast card: with less left it is not begun
    limit: float  # seconds after which it is ended
    gpu: bool = True
    needs: tuple[str, ...] = ()  # modules


CORE = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "einops", "pydantic", "PIL", "av")
DAEMON = (
    *CORE,
    "sqlalchemy",
    "watchdog",
    "pydantic_settings",
    "click",
    "rich",
    "jinja2",
    "prometheus_client",
)
CHECKS = (
    Check("versions", "benchmarks.first_light.machine:versions", 5, 60, gpu=False, needs=("torch",)),
    Check("parity-float32", "benchmarks.first_light.parity:float32", 30, 90, gpu=False, needs=CORE),
    Check("parity-bfloat16", "benchmarks.first_light.parity:bfloat16", 20, 60, gpu=False, needs=CORE),
    Check("full-shape", "benchmarks.placements:whole", 40, 100, gpu=False, needs=CORE),
    Check("placements", "benchmarks.placements:rows", 90, 200, needs=CORE),
    Check("step", "benchmarks.gpu:steps", 60, 150, gpu=False, needs=CORE),
    Check("decode", "benchmarks.gpu:decoding", 20, 60, gpu=False, needs=CORE),
    Check("page-locked", "benchmarks.first_light.machine:page_locked", 25, 60, needs=CORE),
    Check("killed-worker", "benchmarks.first_light.job:killed_worker", 40, 120, gpu=False, needs=DAEMON),
    Check("broken-context", "benchmarks.first_light.machine:broken_context", 15, 60, needs=CORE),
    Check("fp8", "benchmarks.gpu:fp8", 25, 90, needs=CORE),
    Check("reference-loop", "benchmarks.section:rows", 100, 240, gpu=False, needs=DAEMON),
)
