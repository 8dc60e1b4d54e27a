"""Measures how long the device idles between sections, and between jobs.

The real daemon and the real worker, with checkpoints, SQLite and delivery on a real disk, and frames and
latents of the real size; only the engine is replaced: its encoding, steps and decoding take a fixed time.

python -m benchmarks.idle [FOLDER ON THE DISK TO MEASURE]
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import Row
from framepack_core.engine import Clip, Engine, Step
from framepack_core.memory.footprint import MemoryLevel
from framepack_core.progress import Progress
from framepack_core.request import Request
from framepack_core.sampling.unipc import SolverState
from framepackd import daemon
from framepackd.settings.config import load_config
from framepackd.worker import main, messages
from framepackd.worker.generation import Generation

JOBS, SECTIONS, STEPS = 5, 3, 6
ENCODE_SECONDS, STEP_SECONDS, DECODE_SECONDS = 0.3, 0.5, 0.5  # a step is far shorter than on any card
WINDOW, HEIGHT, WIDTH = 9, 640, 608
CONFIG = f"""
model = "demo"
settle_seconds = 0
[defaults]
seconds = 3.6
steps = {STEPS}
latent_window_size = {WINDOW}
height = {HEIGHT}
width = {WIDTH}
"""
LOG = "FRAMEPACK_IDLE_LOG"  # a file that the worker's process writes to


def note(what: str) -> None:
    """Note an event with its time; the clock is the same in all processes."""
    with Path(os.environ[LOG]).open("a") as log:
        log.write(f"{json.dumps([time.monotonic(), what])}\n")


@contextmanager
def busy(seconds: float, what: str) -> Iterator[None]:
    """Take as long as the device would; what is made inside the block counts to that time."""
    begun = time.monotonic()
    note(f"begin {what}")
    yield
    time.sleep(max(seconds - (time.monotonic() - begun), 0))
    note(f"end {what}")


class FixedEngine:
    """An engine whose events, of the real size, come at fixed times."""

    def __init__(self) -> None:
        """Make up frames that are not expensive to write."""
        self.device = torch.device("cpu")
        self.levels, self.level = (MemoryLevel(None, "all"),), 0
        self.compiled = SimpleNamespace(on=False)
        self.models = SimpleNamespace(dtype=torch.float32)
        self._encoded: set[tuple[str, bytes]] = set()
        shade = np.linspace(0, 255, 73 * HEIGHT * WIDTH * 3).reshape(73, HEIGHT, WIDTH, 3)
        self._frames = shade.astype(np.uint8)
        self._edge = torch.zeros(1, 3, 4 * WINDOW - 3, HEIGHT, WIDTH, dtype=torch.float16)

    def prepare(self, *_: object) -> None:
        """Do nothing: there are no networks."""

    def take_level(self, number: int) -> None:
        """Do nothing: there is one level."""

    def encode(self, request: Request) -> SimpleNamespace:
        """Take the time of encoding for a new picture or prompt."""
        content = (request.prompt, request.image.read_bytes())
        if content not in self._encoded:
            with busy(ENCODE_SECONDS, "encode"):
                self._encoded.add(content)
        latents = torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8)
        return SimpleNamespace(start_latents=latents, cuts=())

    def sample(self, request: Request, _: object, progress: Progress) -> Iterator[Step | Clip]:
        """Take the time of every step and decode."""

        def latents() -> torch.Tensor:
            return torch.randn(1, 16, WINDOW, HEIGHT // 8, WIDTH // 8)

        for section in range(SECTIONS):
            for step in range(1, STEPS + 1):
                with busy(STEP_SECONDS, "step"):
                    made = latents()
                    solver = SolverState(step, latents(), tuple(latents() for _ in range(min(step, 3))))
                    progress = replace(progress, solver=solver)
                    if step == STEPS:
                        progress = replace(progress, solver=None, sampled=(*progress.sampled, made))
                yield Step(section, SECTIONS, step, STEPS, made, True, progress)
            with busy(DECODE_SECONDS, "decode"):
                last = section == SECTIONS - 1
                settled = self._frames if last else self._frames[: 36 if section else 0]
                progress = replace(progress, decoded=section + 1, edge=None if last else self._edge.clone())
            start = made[:, :, :1]
            yield Clip(section, SECTIONS, settled, True, self._frames[0], progress, start, "framepack")


def worker_main(connection: Connection, parent: int, device: str) -> None:
    """Run the worker with the engine of fixed times."""
    Engine.load = lambda *_, **__: engine  # type: ignore[method-assign] # in place of the real one
    engine: Any = FixedEngine()
    run = Generation.run

    @functools.wraps(run)
    def noted(self: Generation, *, write: bool = True) -> messages.Message:
        answer = run(self, write=write)
        note("finished")
        return answer

    Generation.run = noted  # type: ignore[method-assign] # the same, with a note
    REAL_MAIN(connection, parent, device)


REAL_MAIN = main.main


def run_jobs(folder: Path) -> Path:
    """Have a daemon run the jobs; gives the file of noted events."""
    events = folder / "events"
    os.environ[LOG] = str(events)
    (folder / "config.toml").write_text(f'state_dir = "{folder}"\n{CONFIG}')
    inbox = folder / "inbox"
    inbox.mkdir()
    for number in range(JOBS):
        noise = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(inbox / f"{number}.png")
        (inbox / f"{number}.txt").write_text(f"number {number}")
    main.main = worker_main
    assert daemon.run(load_config(folder / "config.toml"), once=True) == 0
    return events


def gaps(events: Path) -> dict[str, list[float]]:
    """Sort the idle times of the device by where they lie: between steps, sections or jobs."""
    found: dict[str, list[float]] = {"steps": [], "section": [], "job": [], "finished": []}
    step_ended = decode_ended = finished = begun = worked = 0.0
    for line in events.read_text().splitlines():
        at, what = json.loads(line)
        match what:
            case "begin step" if finished > step_ended > 0:
                found["job"].append(at - decode_ended)  # all of it, encoding too
                found["finished"].append(at - finished)
            case "begin step" if decode_ended > step_ended:
                found["section"].append(at - step_ended - worked)
            case "begin step" if step_ended:
                found["steps"].append(at - step_ended)
            case "end step":
                step_ended, worked = at, 0.0
            case "begin decode" | "begin encode":
                begun = at
            case "end decode" | "end encode":
                worked += at - begun
                decode_ended = at if what == "end decode" else decode_ended
            case "finished":
                finished = at
    return found


def rows(where: str | None = None) -> Iterator[Row]:
    """Measure, in a folder or in the one for temporary files."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        found = gaps(run_jobs(Path(folder)))
    named = {
        "section": ("idle between sections", "last step to the next first one, without the decoding"),
        "steps": ("idle between steps", "checkpoints are written beside the sampling"),
        "finished": ("idle from a job's end to the next first step", "nothing is encoded between jobs"),
        "job": ("idle from the last decode to the next first step", "the same, and the video is written"),
    }
    for key, (name, proves) in named.items():
        if found[key]:
            yield Row(name, 1e3 * statistics.median(found[key]), None, "ms", proves)


if __name__ == "__main__":
    for row in rows(*sys.argv[1:]):
        print(f"{row.name:50} {row.ours:8.1f} {row.unit}   {row.proves}")
