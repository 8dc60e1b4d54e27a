"""Counts what the published model takes on cards of every size, on a simulated GPU (tests/played).

At full shape, without computing: the memory held against the plan's, what the host waits for in a step and in
the decode of a section, and the bytes that go over the bus.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import Row, full_shape
from framepack_core.engine import Clip, Engine, Step
from framepack_core.memory.footprint import CONTEXT, GIB, Placement, Video
from framepack_core.memory.planning import Plan
from framepack_core.request import Request
from tests.played.cards import CARDS, CardModel
from tests.played.gpu import PlayedGpu
from tests.played.models import picture, planner, played, run
from tests.played.tensors import CPU, CUDA

HEIGHT, WIDTH, STEPS = 640, 608, 3  # a section's first step, one between, its last


@dataclass(frozen=True)
class Measured:
    """The cost of a section."""

    plan: Plan
    held: int  # bytes on the card at the peak, with CUDA's context as it is planned
    phase: str  # in which that was
    streamed: int  # blocks that do not stay on the card
    counts: Mapping[str, Mapping[str, float]]  # by phase; see PlayedGpu
    waits: Mapping[str, Counter[str]]  # by phase: what the host waits for, and where
    faults: Counter[str]

    @property
    def placement(self) -> Placement:
        """Say what stays on the card."""
        return self.plan.levels[self.plan.level].placement


def measure(card: CardModel, *, decode: bool = True) -> Measured:
    """Have a card generate a section, or only sample it, on the level that the plan chooses."""
    with tempfile.TemporaryDirectory() as folder:
        image = picture(Path(folder), size=(HEIGHT, WIDTH))
        prompt = "a cat walks over the street and looks at the camera"
        request = Request(image=image, prompt=prompt, seconds=1, steps=STEPS, width=WIDTH, height=HEIGHT)
        video = Video.asked_for(request, (HEIGHT, WIDTH))
        dtypes = torch.bfloat16, torch.float16
        models = full_shape.models(full_shape.DEMO, dtypes, _without_numbers, CPU)
        with PlayedGpu(card, full=True) as gpu:
            plan = planner(CUDA)(video, 0, {})
            engine = Engine(played(models), CUDA, planner(CUDA), pinnable=plan.pinnable)
            engine.prepare(video)
            streamed: list[int] = []

            def leave(event: Step | Clip) -> bool:
                streamed.append(_streamed(engine))
                return not decode and isinstance(event, Step) and event.step == STEPS

            run(gpu, engine, request, leave=leave)
        peaks = gpu.memory.peaks["held"]
        phase = max(peaks, key=lambda name: peaks[name])
    return Measured(plan, peaks[phase] + CONTEXT, phase, streamed[0], gpu.counts, gpu.waits, gpu.faults)


def _without_numbers(_: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _streamed(engine: Engine) -> int:
    """Count the blocks that are streamed in the section at hand."""
    streamer = engine.places._streamers.get(engine.core)
    visit = streamer and streamer._visit
    return len(visit.weights) - len(visit._staying) if visit else 0


def rows() -> Iterator[Row]:
    """Count for each card."""
    for size, card in CARDS.items():
        measured = measure(card)
        step, decode = measured.counts["step"], measured.counts["decode"]
        planned, peak = measured.plan.vram / GIB, f"no more than planned; the peak: {measured.phase}"
        a_copy = f"{measured.streamed} of 60 blocks streamed, a copy each"
        yield Row(
            f"{size} GB, {measured.placement}: held, planned", measured.held / GIB, planned, "GiB", peak
        )
        yield Row("  waits of the host in a step", step["host waits"], None, "", "it runs ahead")
        yield Row(
            "  copies in a step, streamed blocks", step["copies to the card"], measured.streamed, "", a_copy
        )
        yield Row(
            "  over the bus in a step", step["bytes to the card"] / 1e9, None, "GB", "behind the computing"
        )
        yield Row(
            "  over the bus to decode", decode["bytes to the card"] / 1e9, None, "GB", "the VAE, if it visits"
        )
