"""Requests for tiny videos, and the events of a run in a form that can be compared."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine, Step
from framepack_core.request import Request

TinyEngine = Callable[[str], Engine]
GUIDED = {"true_cfg_scale": 2.5, "negative_prompt": "blurry", "guidance_rescale": 0.5}


def request_for(
    folder: Path, *, end: bool = False, keys: tuple[int, ...] = (), **settings: object
) -> Request:
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    small = {"seconds": 1, "latent_window_size": 3, "steps": 3, "width": 48, "height": 32}
    pictures = {
        "image": folder / "0.png",
        "end_image": folder / "1.png" if end else None,
        "keyframes": {number: folder / f"{2 + number}.png" for number in keys},
    }
    return Request.model_validate({"prompt": "a cat", **small, **pictures, **settings})


def everything(events: list[Step | Clip]) -> list[object]:
    """Give all content of events in a form that can be compared bit by bit."""
    return [comparable(vars(event)) for event in events]


def comparable(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(comparable, value))
    return comparable(vars(value)) if hasattr(value, "__dataclass_fields__") else value
