"""Where a video stands: all that the rest of it depends on, so that it can go on elsewhere, bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from framepack_core.cache import BranchState
from framepack_core.sampling import SolverState


@dataclass(frozen=True)
class Progress:
    """The state after a step or a section; to be made durable by whoever wants to resume from it.

    Sections come in generation order. One whose latents are known is not sampled again, one that is decoded
    is not decoded again: its frames were in its clip.
    """

    noise: torch.Tensor  # state of the generator before the noise of the section at hand is drawn, uint8
    sampled: tuple[torch.Tensor, ...] = ()  # finished sections, each (1, 16, W, h, w), float32 on the CPU
    decoded: int = 0  # how many of them are decoded
    edge: torch.Tensor | None = None  # (1, 3, 4W-3, H, W): pixels that fade into the next section's
    solver: SolverState | None = None  # in the section after the sampled ones; None before its first step
    cache: Mapping[str, BranchState] | None = None  # of the guidance branches, with a step cache

    @classmethod
    def start(cls, seed: int) -> "Progress":
        """Give the state before the first step."""
        return cls(noise=torch.Generator("cpu").manual_seed(seed).get_state())

    @property
    def step(self) -> int:
        """How many steps of the section at hand are done."""
        return self.solver.step if self.solver else 0

    def to(self, device: torch.device) -> "Progress":
        """Have what a section goes on from, solver and cache, on a device."""
        solver, cache = self.solver, self.cache
        if solver is not None:
            denoised = tuple(tensor.to(device) for tensor in solver.denoised)
            solver = replace(solver, latents=solver.latents.to(device), denoised=denoised)
        if cache is not None:
            cache = {
                name: replace(state, last=state.last.to(device), last_computed=state.last_computed.to(device))
                for name, state in cache.items()
            }
        return replace(self, solver=solver, cache=cache)
