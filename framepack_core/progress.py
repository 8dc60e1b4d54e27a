"""Holds how far a video is: all that is needed to go on elsewhere, bit for bit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from framepack_core.sampling.step_cache import BranchState
from framepack_core.sampling.unipc import SolverState

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Progress:
    """The state after a step or a section; to be made durable by whoever wants to resume from it.

    Sections come in generation order. One whose latents are known is not sampled again, one that is decoded
    is not decoded again: its frames were in its clip.
    """

    noise: torch.Tensor  # state of the generator before the noise of the section at hand is drawn, uint8
    sampled: tuple[torch.Tensor, ...] = ()  # finished sections, each (1, 16, W, h, w), float32 on the CPU
    decoded: int = 0  # how many of them are decoded
    edge: torch.Tensor | None = None  # (1, 3, 4W-3, H, W) on the CPU: pixels that fade into the next section
    solver: SolverState | None = None  # in the section after the sampled ones; None before its first step
    cache: Mapping[str, BranchState] | None = None  # of the guidance branches, with a step cache

    @classmethod
    def start(cls, seed: int) -> "Progress":
        """Give the state before the first step."""
        return cls(noise=torch.Generator("cpu").manual_seed(seed).get_state())

    def without_later(self, seed: int, before: int = 0) -> "Progress":
        """Go back to the end of the last section that is sampled; what came of later ones was lost.

        Draws anew, from the seed, the noise of its sections and of ``before`` that precede them, of a video
        that is gone on with: the next section then has the noise that it had.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(before + len(self.sampled)):
            torch.randn(self.sampled[0].shape, generator=generator)
        return replace(self, noise=generator.get_state(), solver=None, cache=None)

    @property
    def step(self) -> int:
        """How many steps of the section at hand are done."""
        return self.solver.step if self.solver else 0

    @property
    def newest(self) -> torch.Tensor:
        """Give what the section of the last step looks like by now, (1, 16, W, h, w), float32."""
        return self.solver.denoised[-1] if self.solver else self.sampled[-1]

    def to(self, device: torch.device) -> "Progress":
        """Have what a section goes on from, solver and cache, on a device."""
        return self._with(lambda tensor: tensor.to(device))

    def to_host(self) -> "HostCopy":
        """Copy what a section goes on from to host memory, beside what a GPU computes meanwhile."""
        device = self.solver.latents.device if self.solver else _CPU
        if device.type != "cuda":
            return HostCopy(self.to(_CPU))
        stream = _copying(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # what is copied may not be computed yet

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(stream)  # its memory is not used again before it is copied
            return tensor.to(_CPU, non_blocking=True)  # pinned

        with torch.cuda.stream(stream):
            return HostCopy(self._with(copied), stream.record_event())

    def _with(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Progress":
        solver, cache = self.solver, self.cache
        if solver is not None:
            denoised = tuple(move(tensor) for tensor in solver.denoised)
            solver = replace(solver, latents=move(solver.latents), denoised=denoised)
        if cache is not None:
            cache = {
                name: replace(state, last=move(state.last), last_computed=move(state.last_computed))
                for name, state in cache.items()
            }
        return replace(self, solver=solver, cache=cache)


@dataclass(frozen=True)
class HostCopy:
    """A progress on its way to host memory; may be waited for in any thread."""

    _progress: Progress
    _arrived: torch.cuda.Event | None = None

    def wait(self) -> Progress:
        """Give the progress when it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._progress


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Give the stream that copies from a GPU, one for the whole process."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch says no types
