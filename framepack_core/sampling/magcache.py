"""MagCache: skips the blocks in steps in which their residual is known to change little.

Ma et al. 2025, arXiv:2506.09045. From step to step, the magnitude of the blocks' residual changes by a ratio
that depends on the model and the schedule, hardly on prompt or picture. So ratios that were measured once
tell in advance which steps to skip, the same for every video and on every machine.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from framepack_core.errors import ModelError
from framepack_core.models.registry import ModelSpec
from framepack_core.request import GenerationSettings
from framepack_core.sampling.step_cache import Branch, StepCache, TeaCache
from framepack_core.sections import Kind

# The largest sum of changes over skipped steps, the most steps skipped in a row, the share of steps at the
# start that are always computed, and the change above which a step is always computed. Users of video models
# choose 0.06 to 0.24, 2 to 6 and 0.2 to 0.25; these are FramePack-Studio's, which are cautious.
THRESHOLD, MAX_SKIPS, RETAINED, MAX_CHANGE = 0.1, 2, 0.25, 0.06
# Mean ratios of the residuals' norms at resolution 640 and 25 steps, measured by FramePack-Studio 0.4 with
# the published models, its default settings and seed 31337 (FP-Studio/FramePack-Studio, 2025).
BUILT_IN_RATIOS: dict[Kind, tuple[float, ...]] = {
    "framepack": (
        *(1.0, 1.30469, 1.22656, 1.05469, 1.02344, 1.03906, 1.02344, 1.03906, 1.05469, 1.02344),
        *(1.03906, 0.99609, 1.02344, 1.03125, 1.01562, 1.02344, 1.00781, 1.03906, 0.98828, 1.0),
        *(1.0, 0.98828, 0.94531, 0.93359, 0.78516),
    ),
    "f1": (
        *(1.0, 1.27344, 1.07031, 1.03906, 1.00781, 1.00781, 1.00781, 1.03125, 1.04688, 1.00781),
        *(1.03125, 0.99219, 1.01562, 1.01562, 1.01562, 1.00781, 0.98438, 1.05469, 0.98438, 0.96875),
        *(1.03125, 0.97266, 0.92578, 0.95703, 0.77734),
    ),
}


def skipped_steps(ratios: Sequence[float], steps: int) -> list[int]:
    """List the steps, from 0, in which the blocks are skipped; ratios for another step count are stretched.

    >>> skipped_steps(BUILT_IN_RATIOS["framepack"], 25)
    [6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]
    """
    skipped: list[int] = []
    change, error, in_a_row = 1.0, 0.0, 0
    for step in range(max(int(RETAINED * steps), 1), steps):
        ratio = ratios[round(step * (len(ratios) - 1) / (steps - 1))]
        change *= ratio
        error += abs(1 - change)
        in_a_row += 1
        if error <= THRESHOLD and in_a_row <= MAX_SKIPS and abs(1 - ratio) <= MAX_CHANGE:
            skipped.append(step)
        else:
            change, error, in_a_row = 1.0, 0.0, 0
    return skipped


class MagCache(StepCache):
    """Skips the steps that :func:`skipped_steps` lists."""

    def __init__(self, steps: int, ratios: Sequence[float]) -> None:
        """Begin a section; ``ratios`` from :func:`load_ratios`, or built in."""
        super().__init__(steps)
        self._skipped = frozenset(skipped_steps(ratios, steps))

    def _decide(self, branch: Branch, seen: torch.Tensor | None) -> bool:
        return len(branch.computed) not in self._skipped


class Calibration(StepCache):
    """Computes every step and measures the ratios."""

    def __init__(self, steps: int) -> None:
        """Begin the section to measure; only the positive branch counts."""
        super().__init__(steps)
        self.ratios = [1.0]

    def _decide(self, branch: Branch, seen: torch.Tensor | None) -> bool:
        return True

    def _added(self, branch: Branch, residual: torch.Tensor) -> None:
        if branch.residual is not None and branch is self._branches["positive"]:
            norms, before = residual.float().norm(dim=-1), branch.residual.float().norm(dim=-1)
            self.ratios.append(round((norms / before).mean().item(), 5))


def load_ratios(file: Path) -> tuple[float, ...]:
    """Read the ratios that ``framepackd calibrate`` has written.

    Raises:
        ModelError: the file is not there, or holds something else.
    """
    try:
        ratios = tuple(float(ratio) for ratio in json.loads(file.read_text())["ratios"])
    except OSError as error:
        raise ModelError(
            f"mag_ratios {file}: {error.strerror}: correct the path, or run framepackd calibrate"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"mag_ratios {file} is damaged ({error!r}): run framepackd calibrate") from error
    if not ratios or not all(0 < ratio < float("inf") for ratio in ratios):
        raise ModelError(f"mag_ratios {file} holds no ratios above 0: run framepackd calibrate")
    return ratios


def step_caches(request: GenerationSettings, spec: ModelSpec) -> Callable[[], StepCache | None]:
    """Give the function that makes a section's step cache, or None without one."""
    if request.cache == "teacache":
        return lambda: TeaCache(request.steps)
    if request.cache == "magcache":
        ratios = load_ratios(spec.mag_ratios) if spec.mag_ratios else BUILT_IN_RATIOS[spec.kind]
        return lambda: MagCache(request.steps, ratios)
    return lambda: None
