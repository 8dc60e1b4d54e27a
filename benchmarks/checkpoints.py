"""What a checkpoint costs at FramePack's real size: bytes, time in its thread, time taken from the sampling.

python benchmarks/checkpoints.py [FOLDER ON THE DISK TO MEASURE]
"""

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from framepack_core.cache import BranchState
from framepack_core.progress import Progress
from framepack_core.sampling import SolverState
from framepackd.beside import Beside
from framepackd.checkpoint import Checkpoints

WINDOW, HEIGHT, WIDTH = 9, 640, 640
STEPS, STEP_SECONDS = 25, 0.5  # far less than a step takes on any card, so that a slow disk would show


def section(*, cached: bool) -> list[Progress]:
    """Make up what a section's steps are resumed from; every step's tensors are new, as in life."""
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


def measure(folder: Path, *, cached: bool) -> None:
    """Save a section's steps as the worker does, and print what it took."""
    checkpoints, beside = Checkpoints(folder, {}), Beside()
    copied, stalled, written = [], [], []
    for progress in section(cached=cached):
        time.sleep(STEP_SECONDS)
        begun = time.perf_counter()
        tensors = [*progress.solver.denoised, progress.solver.latents] if progress.solver else []
        for tensor in tensors:
            tensor.clone()  # stands for the copy from the device
        copied.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        beside.start(partial(checkpoints.save, progress, {}))
        stalled.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        beside.wait()
        written.append(time.perf_counter() - begun)
    size = max(path.stat().st_size for path in folder.glob("state-*"))
    print(
        f"{'teacache' if cached else 'plain':9} {size / 1e6:6.1f} MB a step, "
        f"stall {1e3 * statistics.median(stalled):5.2f} ms, "
        f"copy on the host {1e3 * statistics.median(copied):.1f} ms, "
        f"in the thread {1e3 * statistics.median(written):6.1f} ms, worst {1e3 * max(written):.0f} ms"
    )


def main() -> None:
    """Measure with and without a step cache."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for cached in (False, True):
            measure(Path(folder) / str(cached), cached=cached)


main()
