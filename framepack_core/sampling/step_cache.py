"""Step caches: reuse the blocks' residual of an earlier step where it would change little.

Here are their base and TeaCache (Liu et al. 2024, arXiv:2411.19108); MagCache is in
:mod:`framepack_core.sampling.magcache`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

# TeaCache
THRESHOLD = 0.15
# Polynomial that turns the relative change of the input into that of the output, fitted by TeaCache's
# authors for HunyuanVideo; highest power first.
COEFFICIENTS = (733.226126, -401.131952, 67.5869174, -3.1498780, 0.0961237896)


@dataclass(frozen=True)
class BranchState:
    """What restores a branch's cache, without its large tensors."""

    accumulated: float
    computed: tuple[bool, ...]  # for each call so far
    last: torch.Tensor  # latents of the last call, before rounding, (1, 16, W, h, w), float32
    last_computed: torch.Tensor  # latents of the last call in which the blocks were computed


@dataclass
class Branch:
    """The state between calls of one guidance branch."""

    accumulated: float = 0.0
    previous: torch.Tensor | None = None  # the blocks' modulated input
    residual: torch.Tensor | None = None  # the blocks' output minus their input
    computed: list[bool] = field(default_factory=list)
    last: torch.Tensor | None = None
    last_computed: torch.Tensor | None = None


class StepCache(ABC):
    """Runs all blocks, or adds their last residual instead; each section has a new one."""

    looks_at_input = False  # whether decisions depend on the input of the call before

    def __init__(self, steps: int) -> None:
        """Begin a section of ``steps`` steps."""
        self._steps = steps
        self._branches: dict[str, Branch] = {}
        self._branch = Branch()
        self._latents: torch.Tensor | None = None
        self._step = 0
        self._compute: bool | None = None  # None: decide

    def begin(self, branch: str, latents: torch.Tensor, step: int, *, compute: bool | None = None) -> None:
        """Announce the next call; ``compute`` overrides the decision."""
        self._branch = self._branches.setdefault(branch, Branch())
        self._latents, self._step, self._compute = latents, step, compute

    def computed(self, branch: str = "positive") -> list[bool]:
        """List for every call of a branch so far whether the blocks were computed."""
        return self._branches[branch].computed

    @property
    def computed_last(self) -> bool:
        """Whether the blocks were computed in the last step, for any branch."""
        return any(branch.computed[-1] for branch in self._branches.values())

    def state(self) -> Mapping[str, BranchState]:
        """Give the states for :meth:`restore` and :meth:`calls_to_repeat`, by branch."""
        return {
            name: BranchState(branch.accumulated, tuple(branch.computed), branch.last, branch.last_computed)
            for name, branch in self._branches.items()
            if branch.last is not None and branch.last_computed is not None
        }

    def calls_to_repeat(self, state: BranchState) -> Iterator[tuple[torch.Tensor, int, bool]]:
        """List the calls that rebuild the tensors: latents, step, and whether to compute the blocks."""
        last = len(state.computed) - 1
        if not state.computed[last]:
            yield state.last_computed, max(i for i, done in enumerate(state.computed) if done), True
        if state.computed[last] or self.looks_at_input:
            yield state.last, last, state.computed[last]

    def restore(self, name: str, state: BranchState) -> None:
        """Restore the small values of a state, after its calls have been repeated."""
        branch = self._branches[name]
        branch.accumulated, branch.computed = state.accumulated, list(state.computed)
        branch.last, branch.last_computed = state.last, state.last_computed

    def __call__(
        self,
        hidden_states: torch.Tensor,
        modulated: Callable[[], torch.Tensor],
        blocks: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Compute or approximate ``blocks(hidden_states)``; ``modulated`` gives the first block's input."""
        branch = self._branch
        seen = modulated() if self.looks_at_input else None
        if self._compute is not None:
            compute = self._compute
        else:
            compute = branch.residual is None or self._decide(branch, seen)
        branch.previous = seen
        branch.computed.append(compute)
        branch.last = self._latents
        if not compute:
            assert branch.residual is not None, "the first call always computes"
            return hidden_states + branch.residual
        result = blocks(hidden_states)
        residual = result - hidden_states
        self._added(branch, residual)
        branch.residual, branch.last_computed = residual, self._latents
        return result

    def _added(self, branch: Branch, residual: torch.Tensor) -> None:  # noqa: B027 - optional to override
        """Receive a new residual, while the branch still holds the one before."""

    @abstractmethod
    def _decide(self, branch: Branch, seen: torch.Tensor | None) -> bool:
        """Decide whether to compute the blocks; not called in the first step."""


class TeaCache(StepCache):
    """The reference's rule, to the bit; its demo has TeaCache on by default."""

    looks_at_input = True

    def __init__(self, steps: int, threshold: float = THRESHOLD) -> None:
        """Compute the blocks when the expected changes of their output add up to ``threshold``."""
        super().__init__(steps)
        self._threshold = threshold

    def _decide(self, branch: Branch, seen: torch.Tensor | None) -> bool:
        assert seen is not None
        assert branch.previous is not None
        if len(branch.computed) == self._steps - 1:
            branch.accumulated = 0.0
            return True
        distance = (seen - branch.previous).abs().mean() / branch.previous.abs().mean()
        change, relative = 0.0, distance.item()
        for coefficient in COEFFICIENTS:
            change = change * relative + coefficient
        branch.accumulated += change
        if branch.accumulated < self._threshold:
            return False
        branch.accumulated = 0.0
        return True
