"""Checkpoints of a small video, saved one after the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framepack_core.progress import Progress
from framepack_core.sampling.step_cache import BranchState
from framepack_core.sampling.unipc import SolverState
from framepackd.worker.checkpoint import Checkpoints

IDENTITY = {"request": "abc", "versions": ["1", "2"]}
Save = tuple[Progress, bytes | None]


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 16, 3, 4, 6), generator=torch.Generator().manual_seed(seed))


def segment(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(10_000)


def saves() -> list[Save]:
    """List what a run of two sections of two steps, guided and cached, would save."""
    noise = Progress.start(1).noise
    first = tensor(1)  # the noise is x after the first step, and the input of the first call
    calls = [first, tensor(2)]
    cache = {
        "positive": BranchState(0.07654321, (True, False), calls[1], calls[0]),
        "negative": BranchState(0.0, (True, True), calls[1], calls[1]),
    }
    edge = tensor(3, 1, 3, 9, 32, 48).to(torch.float16)
    one, two = tensor(4), tensor(5)
    return [
        (Progress(noise, solver=SolverState(1, first, (tensor(6),)), cache=cache), None),
        (Progress(noise, sampled=(one,)), None),
        (Progress(noise, sampled=(one,), decoded=1, edge=edge), segment(1)),
        (Progress(noise, (one,), 1, edge, SolverState(1, first, (tensor(7), tensor(8)))), None),
        (Progress(noise, (one, two), 1, edge), None),
        (Progress(noise, (one, two), 2), b""),  # a section may settle no frame
    ]


def save_all(folder: Path, upto: int = 99, identity: Mapping[str, Any] = IDENTITY) -> Checkpoints:
    checkpoints = Checkpoints(folder, identity)
    for number, (progress, made) in enumerate(saves()[:upto]):
        checkpoints.save(progress, {"number": number}, made)
        checkpoints.clear()
    return checkpoints


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
