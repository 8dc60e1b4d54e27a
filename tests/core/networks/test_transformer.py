"""The split transformer computes the bits of diffusers' own forward, with fewer operations."""

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.transformer import FULL, TINY, weight_bytes
from framepack_core import sections
from framepack_core.networks import loading
from framepack_core.networks.transformer import guidance, split_transformer, timesteps
from tests.conftest import KINDS, tiny_spec
from tests.core.networks.inputs import SIGMAS, WINDOW, Given, inputs, precompute


def whole_forward(
    transformer: Any, given: Given, step: int, scale: float, dtype: torch.dtype, section: sections.Section
) -> torch.Tensor:
    """Call diffusers' own forward, which computes everything again in each step."""
    latents, text, image_embeds, history = given
    indices = {name: run for name, run in vars(section).items() if name.startswith("indices_")}
    velocity: torch.Tensor = transformer(
        hidden_states=latents,
        timestep=timesteps(SIGMAS, dtype)[step : step + 1],
        guidance=guidance(scale, dtype),
        encoder_hidden_states=text.prompt_embeds,
        encoder_attention_mask=text.prompt_embeds_mask,
        pooled_projections=text.pooled_prompt_embeds,
        image_embeds=image_embeds,
        return_dict=False,
        **history._asdict(),
        **{name: torch.tensor(run) for name, run in indices.items()},
    )[0]
    return velocity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(KINDS))
@torch.inference_mode()
def test_precomputed_rows_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    transformer = loading.load(tiny_spec(name), dtype=dtype, encoder_dtype=torch.float32).transformer
    section = sections.plan(KINDS[name], 3, WINDOW)[1]
    given = inputs(transformer.config, dtype)
    expected = [whole_forward(transformer, given, step, 6.0, dtype, section) for step in range(3)]
    core, embedders = split_transformer(transformer)
    precomputed = precompute(embedders, given, 6.0, dtype)
    tokens = core.history_tokens(section, given[-1])
    for step in (2, 0, 1):
        assert torch.equal(core(given[0], precomputed, step, tokens, None), expected[step])


def test_at_full_shape_the_core_holds_seven_tenths_of_the_weights() -> None:
    with torch.device("meta"):
        transformer = HunyuanVideoFramepackTransformer3DModel(**FULL).to(torch.bfloat16)
    whole = weight_bytes(transformer)
    core, embedders = split_transformer(transformer)
    assert whole == pytest.approx(25.75e9, rel=1e-3)
    assert weight_bytes(core) <= 18.2e9
    assert weight_bytes(core) + weight_bytes(embedders) == whole


class Operations(TorchDispatchMode):
    """Counts the operations that the device computes, without views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()  # in inference mode composite operations are counted as one
def test_a_step_takes_a_tenth_fewer_operations_at_full_depth() -> None:
    dtype = torch.bfloat16
    transformer = HunyuanVideoFramepackTransformer3DModel(**TINY).to(dtype).eval()
    section = sections.plan("framepack", 3, WINDOW)[1]
    given = inputs(transformer.config, dtype)
    with Operations() as whole:
        whole_forward(transformer, given, 1, 6.0, dtype, section)
    core, embedders = split_transformer(transformer)
    precomputed = precompute(embedders, given, 6.0, dtype)
    tokens = core.history_tokens(section, given[-1])
    with Operations() as ours:
        core(given[0], precomputed, 1, tokens, None)
    assert ours.count / whole.count <= 0.91, (ours.count, whole.count)
