"""TeaCache: skip the blocks in steps whose input hardly changed (Liu et al. 2024, arXiv:2411.19108).

diffusers has no TeaCache and its transformer's forward is one piece, so one module that decides
stands in for the two lists of blocks while a section is sampled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

THRESHOLD = 0.15
# Polynomial that turns the relative change of the input into that of the output, fitted by TeaCache's
# authors for HunyuanVideo; highest power first.
COEFFICIENTS = (733.226126, -401.131952, 67.5869174, -3.1498780, 0.0961237896)


class Call(NamedTuple):
    """What the model was called with, before rounding."""

    latents: torch.Tensor  # (1, 16, W, h, w), float32
    sigma: torch.Tensor  # scalar, float32


@dataclass(frozen=True)
class BranchState:
    """What a branch's cache can be brought back from, without its two large tensors."""

    accumulated: float
    computed: tuple[bool, ...]  # per call so far
    last: Call
    last_computed: Call

    def calls_to_repeat(self) -> list[tuple[Call, bool]]:
        """List the calls that leave the cache as it was, with whether to compute the blocks in each."""
        if self.computed[-1]:
            return [(self.last, True)]
        return [(self.last_computed, True), (self.last, False)]


@dataclass
class _Branch:
    """What is remembered from call to call; each guidance branch has its own."""

    accumulated: float = 0.0
    previous: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    computed: list[bool] = field(default_factory=list)
    last: Call | None = None
    last_computed: Call | None = None


class TeaCache(nn.Module):
    """Runs all blocks or, where little changed, adds what they added the last time."""

    def __init__(self, blocks: nn.ModuleList, single_blocks: nn.ModuleList, steps: int, threshold: float):
        """Stand in for the blocks during one section of ``steps`` steps."""
        super().__init__()
        # In tuples, not registered: the blocks go on belonging to the transformer alone.
        self._blocks = (*blocks, *single_blocks)
        self._steps = steps
        self._threshold = threshold
        self._branches: dict[str, _Branch] = {}
        self.branch = "positive"  # set before each call of the transformer
        self._call: Call | None = None
        self._compute: bool | None = None  # None: decide

    def begin(self, latents: torch.Tensor, sigma: torch.Tensor, *, compute: bool | None = None) -> None:
        """Say what the next calls, one a branch, are made with; ``compute`` takes the decision away."""
        self._call = Call(latents, sigma)
        self._compute = compute

    def computed(self, branch: str = "positive") -> list[bool]:
        """Say for every call of a branch so far whether the blocks were computed."""
        return self._branches[branch].computed

    def state(self) -> Mapping[str, BranchState]:
        """Give what :meth:`restore` and the calls to repeat need, by branch."""
        return {
            name: BranchState(branch.accumulated, tuple(branch.computed), branch.last, branch.last_computed)
            for name, branch in self._branches.items()
            if branch.last is not None and branch.last_computed is not None
        }

    def restore(self, name: str, state: BranchState) -> None:
        """Take over the figures of a state whose calls have been repeated."""
        branch = self._branches[name]
        branch.accumulated, branch.computed = state.accumulated, list(state.computed)
        branch.last, branch.last_computed = state.last, state.last_computed

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Have the signature of one block; latent tokens (1, N, C), then text and image tokens."""
        state = self._branches.setdefault(self.branch, _Branch())
        modulated = self._blocks[0].norm1(hidden_states, emb=temb)[0]
        compute = self._decide(state, modulated) if self._compute is None else self._compute
        state.previous = modulated
        state.computed.append(compute)
        state.last = self._call
        if not compute:
            assert state.residual is not None, "the first call always computes"
            return hidden_states + state.residual, encoder_hidden_states
        before = hidden_states
        for block in self._blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb, *rest)
        state.residual = hidden_states - before
        state.last_computed = self._call
        return hidden_states, encoder_hidden_states

    def _decide(self, state: _Branch, modulated: torch.Tensor) -> bool:
        if state.previous is None or len(state.computed) == self._steps - 1:
            state.accumulated = 0.0
            return True
        distance = (modulated - state.previous).abs().mean() / state.previous.abs().mean()
        change, relative = 0.0, distance.item()
        for coefficient in COEFFICIENTS:
            change = change * relative + coefficient
        state.accumulated += change
        if state.accumulated < self._threshold:
            return False
        state.accumulated = 0.0
        return True


@contextmanager
def teacache(transformer: Any, steps: int, threshold: float = THRESHOLD) -> Iterator[TeaCache]:
    """Put a fresh cache in place of the transformer's blocks for one section."""
    blocks, single_blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    cache = TeaCache(blocks, single_blocks, steps, threshold)
    transformer.transformer_blocks = nn.ModuleList([cache])
    transformer.single_transformer_blocks = nn.ModuleList()
    try:
        yield cache
    finally:
        transformer.transformer_blocks = blocks
        transformer.single_transformer_blocks = single_blocks
