"""Measures a checkpoint at FramePack's real size: bytes, time in its thread, time that sampling loses.

python -m benchmarks.checkpoints [FOLDER ON THE DISK TO MEASURE]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import Row
from framepack_core.progress import Progress
from framepack_core.sampling.step_cache import BranchState
from framepack_core.sampling.unipc import SolverState
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.generation import BackgroundWriter

WINDOW, HEIGHT, WIDTH = 9, 640, 640
STEPS, STEP_SECONDS = 25, 0.5  # far less than a step takes on any card, so that a slow disk would show


def section(*, cached: bool) -> list[Progress]:
    """Make up the progress of a section's steps; every step has new tensors, as in a real run."""
    start = Progress.start(1)

    def latents() -> torch.Tensor:
        return torch.randn(1, 16, WINDOW, HEIGHT // 8, WIDTH // 8)

    def cache() -> dict[str, BranchState] | None:
        return {"positive": BranchState(0.1, (True, False), latents(), latents())} if cached else None

    return [
        Progress(
            start.noise,
            solver=SolverState(step, latents(), tuple(latents() for _ in range(min(step, 3)))),
            cache=cache(),
        )
        for step in range(1, STEPS + 1)
    ]


def measure(folder: Path, *, cached: bool) -> Iterator[Row]:
    """Save a section's steps as the worker does, in the background of steps that take a fixed time."""
    checkpoints, writer = Checkpoints(folder, {}), BackgroundWriter()
    stalled, written = [], []
    for progress in section(cached=cached):
        time.sleep(STEP_SECONDS)
        begun = time.perf_counter()
        writer.start(partial(checkpoints.save, progress, {}))
        stalled.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        writer.wait()
        written.append(time.perf_counter() - begun)
    size = max(path.stat().st_size for path in folder.glob("state-*"))
    kind = "TeaCache" if cached else "no cache"
    yield Row(f"a checkpoint, {kind}", size / 1e6, None, "MB", "small enough to write at every step")
    yield Row(
        f"taken from the sampling, {kind}",
        1e3 * statistics.median(stalled),
        1e3 * STEP_SECONDS,
        "ms",
        "beside a step, which is longer on any card",
    )
    for name, value in (("median", statistics.median(written)), ("worst", max(written))):
        yield Row(f"in the thread beside it, {kind}, {name}", 1e3 * value, None, "ms", "done before the next")


def rows(where: str | None = None) -> Iterator[Row]:
    """Measure with and without a step cache, in a folder or in the one for temporary files."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        for cached in (False, True):
            yield from measure(Path(folder) / str(cached), cached=cached)


if __name__ == "__main__":
    for row in rows(*sys.argv[1:]):
        print(f"{row.name:50} {row.ours:8.2f} {row.unit}   {row.proves}")
