"""Runs jobs in the worker's code with a tiny model: what is said, what is made, where the power goes."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framepack_core.request import Request
from framepack_core.sections import frame_count, section_count
from framepackd.worker import identity
from framepackd.worker.engines import Engines
from framepackd.worker.generation import Generation
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Leave,
    Message,
    StepDone,
    Work,
)
from tests.conftest import tiny_spec

ENGINES = Engines()  # the tiny model is loaded once
WINDOW, SECTIONS, STEPS = 3, 2, 2  # of the small jobs here


def work_in(folder: Path, transformer: str = "framepack-i2v", **settings: Any) -> Work:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    small = {"seconds": 1, "latent_window_size": WINDOW, "steps": STEPS, "width": 48, "height": 32}
    request = Request.model_validate({"image": folder / "image.png", "prompt": "a cat", **small, **settings})
    return work_of(request, folder, transformer)


def work_of(request: Request, folder: Path, transformer: str = "framepack-i2v") -> Work:
    """Give the work of a request whose pictures are there, or are never read."""
    sections = section_count(request.seconds, request.latent_window_size)
    return Work(
        job_id="job",
        request=request,
        spec=tiny_spec(transformer),
        fingerprint="abc",
        result=folder / "result",
        checkpoint=folder / "checkpoint",
        preview=folder / "preview.mp4",
        sections=sections,
        frames=frame_count(sections, request.latent_window_size),
        size=(request.height or 0, request.width or 0),
        crf=16,
        save_section_frames=True,
        keep_latents=True,
        device="cpu",
        dtype="auto",
        precision="exact",
        compile_cache=folder / "compiled",
        load_lock=folder / "load.lock",
        levels={},
    )


def chain_in(folder: Path, frames: int = 3, **settings: Any) -> Work:
    """A chain of pictures, each of its own size: all are cropped to that of the first."""
    work = work_in(folder, **settings)
    pictures = [folder / f"frame-{number}.png" for number in range(frames)]
    for number, path in enumerate(pictures):
        shape = (32 + 16 * number, 48, 3)
        pixels = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    clips = [
        work.request.model_copy(update={"image": first, "end_image": last})
        for first, last in pairwise(pictures)
    ]
    return replace(
        work,
        request=clips[0],
        following=tuple(clips[1:]),
        sections=len(clips) * work.sections,
        frames=len(clips) * (work.frames - 1) + 1,
    )


class Ears:
    """The daemon's end of the connection."""

    def __init__(self) -> None:
        self.ours, self.theirs = multiprocessing.Pipe()

    def heard(self) -> list[Message]:
        messages = []
        while self.ours.poll():
            messages.append(self.ours.recv())
        return messages


def run(work: Work, engines: Engines = ENGINES) -> tuple[Message, list[Message]]:
    ears = Ears()
    reply = answer(work, engines, ears.theirs)
    return reply, ears.heard()


def made(work: Work) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(work.result.iterdir())}


def told_steps(messages: list[Message]) -> list[tuple[int, int]]:
    return [(message.section, message.step) for message in messages if isinstance(message, StepDone)]


class PowerCut(BaseException):
    """Ends the run where no handler expects it."""


class Cut:
    """A connection at whose n-th message the power goes."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection, self.left = connection, number

    def send(self, message: Message) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1
        self.connection.send(message)

    def poll(self) -> bool:
        return self.connection.poll()

    def recv(self) -> Any:
        return self.connection.recv()


class LeavingEars(Ears):
    """Asks the worker to leave when it hears something."""

    def __init__(self, when: Callable[[Any], bool]) -> None:
        super().__init__()
        send = self.theirs.send

        def sending(message: Any) -> None:
            send(message)
            if when(message):
                self.ours.send(Leave())

        self.theirs.send = sending  # type: ignore[method-assign] # the same, and an answer


def interrupt_in_the_second_section(
    work: Work, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    """Have a section decoded and the next one begun, by other versions than these."""
    ears = Ears()
    with monkeypatch.context() as patched:
        patched.setattr(identity, "versions", lambda: versions)
        patched.setattr(ears, "theirs", Cut(ears.theirs, 7))
        with pytest.raises(PowerCut):
            Generation(work, ENGINES, ears.theirs).run()
    assert told_steps(ears.heard())[-1] == (2, 1)
