"""Measures the whole engine at full shape: on the whole card, and under caps of its memory.

``python -m benchmarks placements``: on a GPU. Compares the memory predicted, held and reserved on the card,
and times a step, for what :mod:`framepack_core.memory.planning` chooses on cards of these sizes. Weights in
host memory share the same few numbers, and take nearly no room there until they are page-locked.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import Row
from benchmarks.full_shape import SMALL, Make, models, on_device, shared, write
from benchmarks.gpu import DEVICE, HEIGHT, WIDTH, WINDOW, synchronize
from framepack_core import sections
from framepack_core.engine import Clip, Engine
from framepack_core.memory import devices, footprint, planning
from framepack_core.memory.footprint import GIB, ItemBytes, MemoryLevel, Video
from framepack_core.memory.planning import Card, Plan
from framepack_core.models.registry import ModelSpec
from framepack_core.request import Request

CAPS = (24, 16, 12, 8, 6)  # GiB
STEPS = 3  # the first has the tables to make, and fetches more
ALL = 48 * GIB  # of the whole model, and what computing with it takes
ENOUGH = 1.05  # of what is predicted, held at most


@dataclass(frozen=True)
class Taken:
    """The cost of a section: seconds, and bytes of the card."""

    encoding: float
    step: float
    decoding: float
    held: int
    reserved: int
    finite: bool


class Model:
    """The model at full shape, whose engine is planned for a card of any size."""

    def __init__(self, folder: Path, make: Make, device: torch.device) -> None:
        """Make it up, with weights on a device; ``folder`` is for files whose headers are read."""
        self.spec: ModelSpec = write(folder / "model", filled=False)
        self.weights = footprint.weights(self.spec)
        self.dtypes = devices.choose_dtypes(DEVICE, "auto")
        self._models = models(self.spec, self.dtypes, make, device)
        self._picture = folder / "picture.png"
        noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self._picture)
        self.card: Card | None = None
        self.plan: Plan | None = None
        self.engine = Engine(self._models, DEVICE, self._plan, pinnable=True)

    def _plan(self, video: Video, keep_free: int, changed: Mapping[str, int]) -> Plan:
        items = ItemBytes.of(self.dtypes[0].itemsize, self.dtypes[1].itemsize)
        self.plan = planning.make_plan(
            self.weights,
            self.card,
            planning.host_memory(),
            video,
            keep_free=keep_free,
            item_bytes=items,
            changed=changed,
        )
        return self.plan

    @property
    def video(self) -> Video:
        """Give the request."""
        return Video(HEIGHT, WIDTH, window=WINDOW, steps=STEPS)

    @property
    def level(self) -> MemoryLevel:
        """Give the memory level of the engine."""
        return self.engine.levels[self.engine.level]

    def predicted(self) -> int:
        """Give the bytes of the card that the plan predicts, without CUDA's own."""
        assert self.plan is not None
        return self.plan.vram - footprint.CONTEXT

    def section(self) -> Taken:
        """Make a section from the picture and a prompt to its frames."""
        request = Request(
            image=self._picture,
            prompt="a boat on a lake",
            seconds=max(1, WINDOW * 4 / sections.FPS),
            latent_window_size=WINDOW,
            steps=STEPS,
            height=HEIGHT,
            width=WIDTH,
        )
        release()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [_now()]
        conditioned = self.engine.encode(request)
        finite = False
        times.append(_now())
        for event in self.engine.sample(request, conditioned):
            times.append(_now())
            if isinstance(event, Clip):
                finite = event.finite
                break
        encoding, *steps, decoding = (end - begin for begin, end in pairwise(times))
        on_card = DEVICE.type == "cuda"
        return Taken(
            encoding,
            statistics.median(steps[1:]),
            decoding,
            torch.cuda.max_memory_allocated() if on_card else 0,
            torch.cuda.max_memory_reserved() if on_card else 0,
            finite,
        )


def _now() -> float:
    synchronize()
    return time.perf_counter()


def release() -> None:
    """Free memory that is no longer used."""
    gc.collect()
    devices.release_unused(DEVICE)


def whole() -> Iterator[Row]:
    """Generate a section as on a card of this size; weights are made on the card if it holds them all."""
    card = devices.card(DEVICE)
    held = card is None or card.free > ALL
    with tempfile.TemporaryDirectory() as folder:
        began = _now()
        if held:
            model = Model(Path(folder), on_device(DEVICE), DEVICE)
        else:
            model = Model(Path(folder), shared(), torch.device("cpu"))
        model.card = card
        model.engine.prepare(model.video)
        where = model.level.text
        yield Row(
            f"weights made {'on the device' if held else 'in host memory'}", _now() - began, None, "s", where
        )
        taken = model.section()
    yield Row("encoding a prompt and a picture", taken.encoding, None, "s", "")
    yield Row("a step, through the engine", taken.step, None, "s", "")
    yield Row("decoding the first section", taken.decoding, None, "s", "")
    yield Row(
        "pixels are numbers", float(taken.finite), None, "", "random weights; half precision may overflow"
    )
    if card is not None:
        yield from _memory("", taken, model.predicted())
    del model
    release()


def rows() -> Iterator[Row]:
    """Measure under caps; nothing where there is no GPU."""
    if DEVICE.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            yield from capped(Path(folder))


def capped(folder: Path) -> Iterator[Row]:
    """Make a section on the level that is planned under each cap, and on those below under the last one."""
    model = Model(folder, shared(), torch.device("cpu"))
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    used = set[int]()
    caps = [cap for cap in CAPS if Card.assumed(cap).total <= total]
    for cap in caps:
        model.card = Card.assumed(cap)
        model.engine.prepare(model.video)
        used.add(model.engine.level)
        yield from _under(cap, model, total)
    for number in range(max(used) + 1, len(model.engine.levels)):
        model.engine.take_level(number)
        yield from _under(caps[-1], model, total)
    del model
    release()


def _under(cap: float, model: Model, total: int) -> Iterator[Row]:
    assert model.card is not None
    name = f", {model.level.placement}, {cap} GB card"
    with limited((model.card.free - footprint.CONTEXT) / total):
        try:
            taken = model.section()
        except torch.OutOfMemoryError as error:
            why = str(error).partition("\n")[0]
            yield Row(f"fits into the memory{name}", 0.0, 1.0, "", why, good=False)
            return
    yield Row(f"a step{name}", taken.step, None, "s", model.level.text)
    yield from _memory(name, taken, model.predicted())


def _memory(name: str, taken: Taken, predicted: int) -> Iterator[Row]:
    yield Row(
        f"held{name}",
        taken.held / GIB,
        predicted / GIB,
        "GiB",
        "beside what is predicted, without CUDA's own",
        good=taken.held <= ENOUGH * predicted or SMALL,
    )
    yield Row(
        f"reserved{name}", taken.reserved / GIB, predicted / GIB, "GiB", "with what the allocator keeps"
    )


@contextmanager
def limited(fraction: float) -> Iterator[None]:
    """Limit this process to a part of the card's memory."""
    release()
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    for row in rows():
        print(row)
