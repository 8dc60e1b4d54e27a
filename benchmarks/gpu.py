"""Measures a step and a decode on a GPU, with random weights at the full shape.

``python -m benchmarks gpu``; ``FRAMEPACKD_BENCHMARK=tiny`` runs it small, on the CPU if there is no GPU, only
to check that it runs. It needs 32 GB of the card. On a new machine run ``python -m benchmarks gpu
--first-light`` first: see :mod:`benchmarks.first_light`.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from torch import nn

from benchmarks import Row
from benchmarks.first_light import SkippedError
from benchmarks.full_shape import SMALL, config, is_norm
from framepack_core import sections
from framepack_core.history import HistoryContext
from framepack_core.memory import devices
from framepack_core.networks import compiling, vae
from framepack_core.networks.compiling import CompiledBlocks
from framepack_core.networks.encoders import pad_prompt_embeds
from framepack_core.networks.fp8 import multiplies
from framepack_core.networks.quantization import reduce
from framepack_core.networks.transformer import Blocks, Core, guidance, split_transformer, timesteps

HEIGHT, WIDTH, WINDOW, PROMPT_TOKENS, IMAGE_TOKENS = (32, 32, 3, 8, 8) if SMALL else (640, 608, 9, 96, 729)
BACKENDS = ("native", "_native_flash", "_native_cudnn")
BLOCKS, HEADS, CHANNELS = (5, 2, 32) if SMALL else (60, 24, 3072)
REPEATS = 1 if SMALL else 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
SIGMAS = torch.tensor([0.9, 0.5, 0.0])


def rows() -> Iterator[Row]:
    """Measure; nothing where there is no GPU."""
    if DEVICE.type != "cuda" and not SMALL:
        return
    with torch.inference_mode():
        yield from steps()
        yield from decoding()


def steps() -> Iterator[Row]:
    """Time a step, against the best that the card can do."""
    yield from ceilings()
    yield from resident()


def seconds(call: Callable[[], object]) -> float:
    """Time a call until the device has done its work; the median of a few."""
    if not SMALL:
        call()
    taken = []
    for _ in range(REPEATS):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tokens() -> tuple[int, int]:
    """Count the tokens of a step: all of them, and how many of these are the latents'."""
    height, width = HEIGHT // 8, WIDTH // 8
    a_frame = -(-height // 2) * -(-width // 2)
    image = (WINDOW + 2) * a_frame + -(-height // 4) * -(-width // 4) + 4 * -(-height // 8) * -(-width // 8)
    return image + IMAGE_TOKENS + PROMPT_TOKENS, WINDOW * a_frame


def step_flops() -> float:
    """Count a step's multiplications and additions: attention, and the blocks' linear layers."""
    length = tokens()[0]
    return BLOCKS * (4 * length**2 * CHANNELS + 2 * 12 * CHANNELS**2 * length)


def ceilings() -> Iterator[Row]:
    """Measure the best that the card can do."""
    length = tokens()[0]
    yield Row("matmul", matmul_flops() / 1e12, None, "TFLOP/s", "the ceiling")
    size = 1 << (20 if SMALL else 30)
    there = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    rates = {}
    for pinned in (False, True):
        here = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and DEVICE.type == "cuda")
        rates[pinned] = size / seconds(partial(there.copy_, here, non_blocking=True)) / 1e9
    yield Row("copy to the card, page-locked", rates[True], rates[False], "GB/s", "why blocks are locked")
    query = torch.randn(1, HEADS, length, CHANNELS // HEADS, device=DEVICE).to(DTYPE)
    taken = seconds(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    rate = 4 * length**2 * query.shape[1] * query.shape[3] / taken / 1e12
    yield Row("attention, PyTorch's choice", rate, None, "TFLOP/s", "half of a step")


def matmul_flops() -> float:
    """Measure how much a second the card multiplies and adds at best, in the shape of a block's largest."""
    length = tokens()[0]
    left = torch.randn(length, CHANNELS, device=DEVICE).to(DTYPE)
    right = torch.randn(CHANNELS, 4 * CHANNELS, device=DEVICE).to(DTYPE)
    return 2 * length * CHANNELS * 4 * CHANNELS / seconds(lambda: left @ right)


def random_weights(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Give weights to a module from the meta device: a pool of random numbers, repeated."""
    pool = torch.randn(1 << 22, device=device).mul_(0.02).to(DTYPE)
    module = module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), pool.numel()):
            part = flat[start : start + pool.numel()]
            part.copy_(pool[: part.numel()])
        if is_norm(name, parameter.shape):
            parameter.data.fill_(1)
    return module.eval().requires_grad_(requires_grad=False)


class Step:
    """A step of diffusers' forward, and one of ours."""

    def __init__(self) -> None:
        """Make up weights and inputs on the device."""
        with torch.device("meta"):
            transformer = HunyuanVideoFramepackTransformer3DModel(**config("transformer")).to(DTYPE)
        self.transformer: Any = random_weights(transformer, DEVICE)
        told: Any = transformer.config

        def made_up(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE).to(DTYPE)

        embeds = made_up(1, PROMPT_TOKENS, told.text_embed_dim)
        self.text = pad_prompt_embeds(embeds, made_up(1, told.pooled_projection_dim))
        self.image = made_up(1, IMAGE_TOKENS, told.image_proj_dim)
        self.latents = made_up(1, 16, WINDOW, HEIGHT // 8, WIDTH // 8)
        self.history = HistoryContext(
            *(made_up(1, 16, frames, HEIGHT // 8, WIDTH // 8) for frames in (2, 2, 16))
        )
        self.section = sections.plan("framepack", 3, WINDOW)[1]
        self.steps, self.guidance = timesteps(SIGMAS, DTYPE).to(DEVICE), guidance(10.0, DTYPE).to(DEVICE)

    def whole(self) -> torch.Tensor:
        """Call diffusers' forward."""
        indices = {name: run for name, run in vars(self.section).items() if name.startswith("indices_")}
        velocity: torch.Tensor = self.transformer(
            hidden_states=self.latents,
            timestep=self.steps[:1],
            guidance=self.guidance,
            encoder_hidden_states=self.text.prompt_embeds,
            encoder_attention_mask=self.text.prompt_embeds_mask,
            pooled_projections=self.text.pooled_prompt_embeds,
            image_embeds=self.image,
            return_dict=False,
            **self.history._asdict(),
            **{name: torch.tensor(run, device=DEVICE) for name, run in indices.items()},
        )[0]
        return velocity

    def take_apart(self) -> tuple[Core, Callable[[], torch.Tensor]]:
        """Give the core, and a step of it; from then on ``whole`` cannot be called."""
        core, embedders = split_transformer(self.transformer)

        tables = embedders.precompute(
            self.text, self.image, self.steps, self.guidance, lambda _: nullcontext()
        )
        look_back = core.history_tokens(self.section, self.history)
        return core, lambda: core(self.latents, tables, 0, look_back, None)


def resident() -> Iterator[Row]:
    """Time a step with all weights on the card: diffusers' forward, ours, ours compiled."""
    step = Step()
    eager = seconds(step.whole)
    if DEVICE.type == "cuda":
        for backend in BACKENDS:
            step.transformer.set_attention_backend(backend)
            yield Row(f"diffusers' forward, {backend}", seconds(step.whole), eager, "s", "attention backends")
        step.transformer.set_attention_backend("native")
    before = step.whole()
    core, ours = step.take_apart()
    same = torch.equal(ours(), before)
    yield Row("a step with tables is equal to the bit", same, 1.0, "", "on this device too", good=same)
    plain = seconds(ours)
    yield Row("a step, eager", plain, eager, "s", "tables and section constants")
    if DEVICE.type == "cuda":
        compiled = as_the_worker_compiles(core.blocks)
        compiled.on = True
        taken = seconds(ours)
        yield Row("a step, compiled blocks", taken, eager, "s", "the default of longer videos")
        error = (ours().float() - before.float()).norm() / before.float().norm()
        yield Row("what compiling changes, relative", error.item(), None, "", "within rounding")
        ceiling = matmul_flops()
        for name, each in (("diffusers' forward", eager), ("a step, eager", plain), ("compiled", taken)):
            yield Row(f"MFU, {name}", 100 * step_flops() / each / ceiling, None, "%", "of matmul, this run's")
    release()


def as_the_worker_compiles(blocks: Blocks) -> CompiledBlocks:
    """Give the switch of blocks, which are compiled with the worker's settings."""
    compiling.set_up(Path(tempfile.mkdtemp(prefix="compiled-")))
    return CompiledBlocks(*blocks.transformer_blocks, *blocks.single_transformer_blocks)


def fp8() -> Iterator[Row]:
    """Time a step of blocks in fp8, against one of blocks as they are."""
    if not multiplies(DEVICE, DTYPE):
        raise SkippedError(f"{devices.describe(DEVICE)} does not multiply in fp8")
    core, ours = Step().take_apart()
    exact, eager = ours(), seconds(ours)
    reduce(core.blocks, "fp8", DTYPE, DEVICE)
    release()
    blocks = core.blocks
    compiled = as_the_worker_compiles(blocks)
    for compiled.on in (False, True):
        name = f"a step in fp8, {'compiled' if compiled.on else 'eager'}"
        yield Row(name, seconds(ours), eager, "s", "beside bfloat16, eager")
    error = (ours().float() - exact.float()).norm() / exact.float().norm()
    yield Row("what fp8 changes, relative", error.item(), None, "", "random weights")
    release()


def decoding() -> Iterator[Row]:
    """Time the decode of a steady section, and of one whose neighbour's tiles are kept."""
    with torch.device("meta"):
        decoder = AutoencoderKLHunyuanVideo(**config("vae")).to(DTYPE)
    decoder = random_weights(decoder, DEVICE).to(torch.float16 if DEVICE.type == "cuda" else torch.float32)
    latents = torch.randn(1, 16, 2 * WINDOW, HEIGHT // 8, WIDTH // 8)
    for tile in (None, 256):
        devices.set_tiles(decoder, tile)
        taken = seconds(lambda: vae.decode(latents, decoder))
        yield Row(
            f"decoding a section, {'tiles' if tile else 'whole frames'}", taken, None, "s", "without reuse"
        )
    release()


def release() -> None:
    """Free memory that is no longer used."""
    gc.collect()
    devices.release_unused(DEVICE)


if __name__ == "__main__":
    for row in rows():
        print(row)
