"""Denoises the latents of one section: noise schedule, guidance and the UniPC solver.

The solver is UniPC (Zhao et al. 2023, arXiv:2302.04867) of order 3 for flow matching, predicting data,
with B(h) = h ("bh1"), written from the paper's equations. Its scalars are float64 on the host.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from framepack_core.sampling.step_cache import BranchState, StepCache

Denoise = Callable[[torch.Tensor, int], torch.Tensor]  # latents, step
Velocity = Callable[[torch.Tensor, int, str], torch.Tensor]  # latents, step, guidance branch

# Shift of the schedule by the number of tokens: mu grows linearly from 0.5 at 256 tokens to 1.15 at 4096,
# as in Flux, and FramePack stops it at a shift of 7.
MU_AT_256, MU_AT_4096, MAX_SHIFT = 0.5, 1.15, 7.0
SOLVER_ORDER = 3


def schedule_mu(tokens: int) -> float:
    """Give the logarithm of the schedule's shift for a section of ``tokens`` latent tokens.

    >>> round(schedule_mu(4096), 6), schedule_mu(13680) == math.log(7)
    (1.15, True)
    """
    slope = (MU_AT_4096 - MU_AT_256) / (4096 - 256)
    return min(MU_AT_256 + slope * (tokens - 256), math.log(MAX_SHIFT))


def flow_sigmas(steps: int, mu: float) -> torch.Tensor:
    """Give ``steps`` + 1 noise levels from 1 down to 0, (steps + 1,), float32."""
    t = np.linspace(1.0, 0.0, steps + 1)
    with np.errstate(divide="ignore"):  # at the last level 1/t is infinite, and sigma therefore 0
        sigmas = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    return torch.from_numpy(sigmas.astype(np.float32))


class Denoiser:
    """Predicts the denoised latents of one section from the velocity and the guidance.

    The latents are rounded to the transformer's dtype, as in FramePack: denoised = rounded x - velocity *
    sigma, in float32.
    """

    def __init__(
        self,
        velocity: Velocity,
        sigmas: torch.Tensor,
        *,
        true_cfg_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        dtype: torch.dtype = torch.float32,
        cache: StepCache | None = None,
    ) -> None:
        """Keep what all steps share; the branch "negative" runs only if ``true_cfg_scale`` is not 1."""
        self._velocity = velocity
        self._sigmas: list[float] = sigmas.tolist()  # on the host: reading them waits for no device
        self._true_cfg_scale = true_cfg_scale
        self._guidance_rescale = guidance_rescale
        self._dtype = dtype
        self._cache = cache

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Denoise latents (1, 16, T, h, w) at the noise level of a step, from 0; both float32."""
        rounded = latents.to(self._dtype)
        velocity = self._branch("positive", latents, step)
        if self._true_cfg_scale != 1:
            unconditional = self._branch("negative", latents, step)
            guided = unconditional + self._true_cfg_scale * (velocity - unconditional)
            velocity = rescale_guidance(guided, velocity, self._guidance_rescale)
        return rounded.float() - velocity * self._sigmas[step]

    def restore_cache(self, branches: Mapping[str, BranchState]) -> None:
        """Restore a new cache to its state after a step.

        The residuals are too large to save: the calls that computed them are repeated instead.
        """
        assert self._cache is not None
        for branch, state in branches.items():
            for latents, step, compute in self._cache.calls_to_repeat(state):
                self._branch(branch, latents, step, compute=compute)
            self._cache.restore(branch, state)

    def _branch(
        self, branch: str, latents: torch.Tensor, step: int, *, compute: bool | None = None
    ) -> torch.Tensor:
        if self._cache is not None:
            self._cache.begin(branch, latents, step, compute=compute)
        return self._velocity(latents.to(self._dtype), step, branch).float()


def rescale_guidance(guided: torch.Tensor, positive: torch.Tensor, amount: float) -> torch.Tensor:
    """Pull the spread of a guided velocity back towards the unguided one's (arXiv:2305.08891, 3.4)."""
    if amount == 0:
        return guided
    dims = list(range(1, guided.ndim))
    matched = guided * (positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return amount * matched + (1 - amount) * guided


@dataclass(frozen=True)
class SolverState:
    """The solver's state after a step: all that the rest of the section depends on."""

    step: int  # how many steps are done
    latents: torch.Tensor  # x at the noise level of the step just done, corrected; float32
    denoised: tuple[torch.Tensor, ...]  # the last predictions, newest last


def sample_unipc(
    denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor, resume: SolverState | None = None
) -> Iterator[SolverState]:
    """Solve from noise to data, one model call a step; the last ``denoised`` is the result.

    Args:
        denoise: maps latents and a step, from 0, to the denoised latents.
        noise: latents at ``sigmas[0]`` = 1, float32; not used with ``resume``.
        sigmas: noise levels, one more than steps; the last, 0, is never evaluated.
        resume: a state that was yielded before; continue with the step after it.
    """
    steps = len(sigmas) - 1
    levels = sigmas.double().cpu().numpy()
    max_order = min(SOLVER_ORDER, steps - 1)
    state = resume
    if state is None:
        state = SolverState(1, noise, (denoise(noise, 0),))
        yield state
    latents, denoised = state.latents, state.denoised
    for i in range(state.step, steps):
        order = min(i, max_order)
        update = _Update.between(levels[i - order : i + 1])
        base = denoised[-1] + update.ratio * (latents - denoised[-1])
        differences = [
            (older - denoised[-1]) / r
            for older, r in zip(reversed(denoised[-order:-1]), update.r, strict=True)
        ]
        predicted = _combine(base, update.scale, update.predictor, differences)
        newest = denoise(predicted, i)
        latents = _combine(base, update.scale, update.corrector, [*differences, newest - denoised[-1]])
        denoised = (*denoised, newest)[-max_order:]
        yield SolverState(i + 1, latents, denoised)


def _combine(
    base: torch.Tensor, scale: float, weights: list[float], differences: list[torch.Tensor]
) -> torch.Tensor:
    for weight, difference in zip(weights, differences, strict=True):
        base = base - scale * weight * difference
    return base


@dataclass(frozen=True)
class _Update:
    """The scalars of one UniPC step from level s to t, in the half-logSNR lambda = -ln sigma.

    With h = lambda_t - lambda_s and H = -h, the step is base - B * sum_k rho_k D_k, where the weights
    rho solve the moment equations V rho = b (UniPC, theorem 3.1), V's rows being powers of r.
    """

    ratio: float  # t / s
    scale: float  # B(h) = H
    r: list[float]  # positions of the older predictions relative to the step
    predictor: list[float]  # weights of the older differences
    corrector: list[float]  # the same and, last, that of the newest

    @classmethod
    def between(cls, levels: "np.ndarray[Any, np.dtype[np.float64]]") -> "_Update":
        """Compute the update over the last two of ``levels``, with the ones before as history."""
        *older, s, t = (-math.log(level) for level in levels)
        big_h = -(t - s)
        r = [(lam - s) / (t - s) for lam in reversed(older)]
        order = len(r) + 1
        moments = _moments(big_h, order)
        powers = np.vander(np.array([*r, 1.0]), order, increasing=True).T
        # The paper fixes a single weight to 1/2.
        predictor = [] if order == 1 else [0.5]
        corrector = [0.5]
        if order > 2:
            predictor = np.linalg.solve(powers[:-1, :-1], moments[:-1]).tolist()
        if order > 1:
            corrector = np.linalg.solve(powers, moments).tolist()
        return cls(levels[-1] / levels[-2], big_h, r, predictor, corrector)


def _moments(big_h: float, order: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Give b_k = phi_k(H) k! / H with phi_1 = expm1(H)/H - 1 and phi_k+1 = phi_k/H - 1/(k+1)!."""
    phi = math.expm1(big_h) / big_h - 1
    moments = []
    for k in range(1, order + 1):
        moments.append(phi * math.factorial(k) / big_h)
        phi = phi / big_h - 1 / math.factorial(k + 1)
    return np.array(moments)
