"""Measures a step: weights, operations, memory traffic and Python time, against diffusers' own forward."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import Row
from framepack_core import sections
from framepack_core.history import HistoryContext
from framepack_core.networks.encoders import pad_prompt_embeds
from framepack_core.networks.quantization import reduce
from framepack_core.networks.transformer import guidance, split_transformer, timesteps

FULL = {"has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True}  # else its defaults
TINY = FULL | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_embed_dim": 32,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
    "image_proj_dim": 24,
}
WINDOW, PROMPT_TOKENS, IMAGE_TOKENS = 9, 96, 729
SIGMAS = torch.tensor([0.9, 0.5, 0.0])
REPEATS = 15


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call] # as torch has it
    """Counts operations that compute (no views), and the bytes moved by those other than matrix products."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()  # type: ignore[no-untyped-call] # as torch has it
        self.count = 0
        self.elementwise_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            name = str(func)
            if not any(word in name for word in ("mm", "attention", "convolution")):
                tensors = (leaf for leaf in tree_leaves((args, kwargs, results)))
                self.elementwise_bytes += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return results


class Pair:
    """A step of diffusers' forward and one of ours, of the same transformer and inputs."""

    def __init__(self, size: tuple[int, int], prompt_tokens: int, image_tokens: int) -> None:
        """Make up the weights and the inputs of a narrow model of full depth."""
        dtype = torch.bfloat16
        transformer = HunyuanVideoFramepackTransformer3DModel(**TINY).to(dtype).eval()
        c = transformer.config

        def made_up(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype)

        height, width = size[0] // 8, size[1] // 8
        embeds, pooled = made_up(1, prompt_tokens, c.text_embed_dim), made_up(1, c.pooled_projection_dim)
        text = pad_prompt_embeds(embeds, pooled)
        latents = made_up(1, 16, WINDOW, height, width)
        history = HistoryContext(*(made_up(1, 16, frames, height, width) for frames in (2, 2, 16)))
        image = made_up(1, image_tokens, c.image_proj_dim)
        section = sections.plan("framepack", 3, WINDOW)[1]
        steps, scale = timesteps(SIGMAS, dtype), guidance(10.0, dtype)
        indices = {
            name: torch.tensor(run) for name, run in vars(section).items() if name.startswith("indices_")
        }

        def whole() -> None:
            transformer(
                hidden_states=latents,
                timestep=steps[:1],
                guidance=scale,
                encoder_hidden_states=text.prompt_embeds,
                encoder_attention_mask=text.prompt_embeds_mask,
                pooled_projections=text.pooled_prompt_embeds,
                image_embeds=image,
                return_dict=False,
                **history._asdict(),
                **indices,
            )

        self.whole: Callable[[], None] = whole
        self.transformer = transformer
        self._tables = (text, image, steps, scale)
        self._section = (section, history)
        self._latents = latents

    def take_apart(self) -> Callable[[], None]:
        """Give our step, of ``core``; from then on ``whole`` cannot be called."""
        core, embedders = split_transformer(self.transformer)
        self.core = core
        precomputed = embedders.precompute(*self._tables, lambda _: nullcontext())
        tokens = core.history_tokens(*self._section)
        return lambda: core(self._latents, precomputed, 0, tokens, None)


def weight_bytes(*modules: nn.Module) -> int:
    """Add up the bytes of the parameters and buffers of modules."""
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )


def rows() -> Iterator[Row]:
    """Measure."""
    with torch.inference_mode():
        yield from weights()
    with torch.no_grad():  # in inference mode composite operations count as one
        yield from operations()
        yield python_time()


def weights() -> Iterator[Row]:
    """Count what the sampling loop holds at full shape."""
    for precision in ("exact", "fp8"):
        with torch.device("meta"):
            transformer = HunyuanVideoFramepackTransformer3DModel(**FULL).to(torch.bfloat16)
        whole = weight_bytes(transformer) / 1e9
        core, _ = split_transformer(transformer)
        reduce(core.blocks, precision, torch.bfloat16)
        name = f"weights in the sampling loop, {precision}"
        yield Row(name, weight_bytes(core) / 1e9, whole, "GB", "what a card has to hold or be sent")


def operations() -> Iterator[Row]:
    """Count operations and traffic of a step at full depth."""
    pair = Pair((160, 144), PROMPT_TOKENS, IMAGE_TOKENS)
    with Operations() as whole:
        pair.whole()
    ours_step = pair.take_apart()
    with Operations() as ours:
        ours_step()
    yield Row("operations a step, full depth", ours.count, whole.count, "", "less to launch")
    yield Row(
        "elementwise traffic a step, narrow",
        ours.elementwise_bytes / 1e6,
        whole.elementwise_bytes / 1e6,
        "MB",
        "no more than before",
    )


def python_time() -> Row:
    """Time a step of a model so small that Python and dispatch are nearly all of it."""
    pair = Pair((32, 32), 8, 8)
    before = median_ms(pair.whole)
    return Row(
        "a step of a tiny model, full depth", median_ms(pair.take_apart()), before, "ms", "Python's part"
    )


def median_ms(call: Callable[[], None]) -> float:
    """Time a call; repeated."""
    call()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1000


if __name__ == "__main__":
    for row in rows():
        print(row)
