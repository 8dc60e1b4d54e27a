"""A tiny decoder of random weights, and its file as it is published."""

from functools import cache

import numpy as np
import torch

from framepack_core.models import taehv_files


@cache
def random_weights() -> dict[str, torch.Tensor]:
    """Draw weights in the layout of the real ones, scaled so that pictures are neither black nor white."""
    rng = np.random.default_rng(0)
    drawn = {}
    for name, shape in taehv_files.shapes().items():
        spread = 0.05 if len(shape) == 1 else np.prod(shape[1:], dtype=int) ** -0.5
        drawn[name] = torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(spread))
    return drawn


def as_published(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Give the content of a published file: half precision, with an unused encoder."""
    found = {f"decoder.{name}": weight.half() for name, weight in random_weights().items()}
    found["encoder.0.weight"] = torch.zeros(64, 3, 3, 3, dtype=torch.float16)
    changes = {key.replace("__", "."): weight for key, weight in changed.items()}
    return {key: weight for key, weight in (found | changes).items() if weight is not None}
