"""Holds the progress of a video: all that is needed to resume it, with the same bits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from framepack_core.sampling.step_cache import BranchState
from framepack_core.sampling.unipc import SolverState

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Progress:
    """The state after a step or a section; a caller that wants to resume saves it.

    Sections are in generation order. A sampled section is not sampled again, a decoded one not decoded again:
    its clip had its frames.
    """

    noise: torch.Tensor  # state of the generator before the current section's noise is drawn, uint8
    sampled: tuple[torch.Tensor, ...] = ()  # finished sections, each (1, 16, W, h, w), float32 on the CPU
    decoded: int = 0  # how many of them are decoded
    edge: torch.Tensor | None = None  # (1, 3, 4W-3, H, W) on the CPU: pixels that fade into the next section
    solver: SolverState | None = None  # of the current section; None before its first step
    cache: Mapping[str, BranchState] | None = None  # by guidance branch; None without a step cache

    @classmethod
    def start(cls, seed: int) -> "Progress":
        """Give the state before the first step."""
        return cls(noise=torch.Generator("cpu").manual_seed(seed).get_state())

    def without_later(self, seed: int, before: int = 0) -> "Progress":
        """Go back to the end of the last sampled section, because later work was lost.

        Restores the generator's state: draws from the seed the noise of the sampled sections, and before them
        of the ``before`` sections of an extended video. The next section then gets the same noise.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(before + len(self.sampled)):
            torch.randn(self.sampled[0].shape, generator=generator)
        return replace(self, noise=generator.get_state(), solver=None, cache=None)

    @property
    def step(self) -> int:
        """How many steps of the current section are done."""
        return self.solver.step if self.solver else 0

    @property
    def newest(self) -> torch.Tensor:
        """The latest prediction of the section that was sampled last, (1, 16, W, h, w), float32."""
        return self.solver.denoised[-1] if self.solver else self.sampled[-1]

    def to(self, device: torch.device) -> "Progress":
        """Move the state of the current section, solver and cache, to a device."""
        return self._with(lambda tensor: tensor.to(device))

    def to_host(self) -> "HostCopy":
        """Begin to copy the solver's and cache's state to host memory, while a GPU goes on computing."""
        device = self.solver.latents.device if self.solver else _CPU
        if device.type != "cuda":
            return HostCopy(self.to(_CPU))
        stream = _copy_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the tensors may not be computed yet

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(stream)  # its memory is not reused before it is copied
            return tensor.to(_CPU, non_blocking=True)  # into page-locked memory

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
    """A progress that is being copied to host memory; any thread may wait for it."""

    _progress: Progress
    _arrived: torch.cuda.Event | None = None

    def wait(self) -> Progress:
        """Wait until the copy is complete, and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._progress


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream that copies from a GPU, one for the whole process."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch says no types
