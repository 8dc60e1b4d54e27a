"""The solver against closed-form solutions, without recordings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framepack_core.sampling.unipc import Denoiser, flow_sigmas, rescale_guidance, sample_unipc, schedule_mu


@given(steps=st.integers(1, 100), tokens=st.integers(1, 20000))
def test_sigmas_fall_from_one_to_zero(steps: int, tokens: int) -> None:
    sigmas = flow_sigmas(steps, schedule_mu(tokens))
    assert sigmas.dtype == torch.float32
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


def test_the_solver_converges_on_a_distribution_with_a_known_answer() -> None:
    """Data ~ N(2, 0.5^2): the ideal denoiser is known, and so is the end of the flow for each noise."""
    mean, deviation = 2.0, 0.5
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def denoise(x: torch.Tensor, step: int) -> torch.Tensor:
        sigma = sigmas[step]
        spread = ((1 - sigma) * deviation) ** 2 + sigma**2
        return mean + (1 - sigma) * deviation**2 * (x - (1 - sigma) * mean) / spread

    errors = []
    for steps in (5, 10, 20, 40):
        sigmas = flow_sigmas(steps, mu=0.0).double()
        *_, last = sample_unipc(denoise, noise, sigmas)
        errors.append((last.denoised[-1] - (mean + deviation * noise)).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-2
    assert errors[0] / errors[-1] > 8


def test_leaving_the_steps_early_calls_the_model_no_further() -> None:
    calls = []

    def denoise(x: torch.Tensor, step: int) -> torch.Tensor:
        calls.append(step)
        return x

    for state in sample_unipc(denoise, torch.zeros(1), flow_sigmas(10, 1.0)):
        if state.step == 3:
            break
    assert calls == [0, 1, 2]


def test_rescaling_keeps_the_spread_of_the_unguided_velocity() -> None:
    positive = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    guided = 3 * positive + 1
    assert torch.equal(rescale_guidance(guided, positive, 0.0), guided)
    assert rescale_guidance(guided, positive, 1.0).std().item() == pytest.approx(
        positive.std().item(), rel=1e-5
    )


def test_without_guidance_the_model_is_called_once_a_step() -> None:
    calls: list[tuple[int, str]] = []

    def velocity(latents: torch.Tensor, step: int, branch: str) -> torch.Tensor:
        calls.append((step, branch))
        return latents

    for scale, expected in ((1.0, [(1, "positive")]), (2.0, [(1, "positive"), (1, "negative")])):
        calls.clear()
        denoiser = Denoiser(velocity, flow_sigmas(2, 1.0), true_cfg_scale=scale)
        denoiser(torch.zeros(1, 16, 1, 2, 2), 1)
        assert calls == expected


def test_the_shift_grows_with_the_tokens_and_stops_at_seven() -> None:
    assert schedule_mu(256) == 0.5
    assert schedule_mu(8797) < math.log(7) == schedule_mu(8798)
