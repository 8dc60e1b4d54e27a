"""What only a GPU can show, with random weights at the full shape: rows only where there is one.

``python -m benchmarks gpu``; ``FRAMEPACKD_BENCHMARK=tiny`` runs it small, on the CPU if need be, to see
that it runs. What stays on the card wants 32 GB of it; the streamed plans run under caps, from 26 GB of host
memory.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from torch import nn

from benchmarks import Row
from benchmarks.transformer import FULL, TINY
from framepack_core import memory, sections, vae
from framepack_core.attention import use_attention
from framepack_core.compiling import CompiledBlocks
from framepack_core.conditioning import pad_prompt_embeds
from framepack_core.history import HistoryContext
from framepack_core.streaming import Streamer
from framepack_core.transformer import Core, guidance, take_apart, timesteps

SMALL = os.environ.get("FRAMEPACKD_BENCHMARK") == "tiny"
HEIGHT, WIDTH, WINDOW, PROMPT_TOKENS, IMAGE_TOKENS = (64, 64, 3, 8, 8) if SMALL else (640, 608, 9, 96, 729)
CONFIG: dict[str, Any] = TINY if SMALL else FULL
CAPS = (24, 16, 12, 8, 6)  # GiB
BACKENDS = ("native", "_native_flash", "_native_cudnn")
REPEATS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
SIGMAS = torch.tensor([0.9, 0.5, 0.0])


def rows() -> Iterator[Row]:
    """Measure; nothing where there is no GPU."""
    if DEVICE.type != "cuda" and not SMALL:
        return
    with torch.inference_mode():
        yield from ceilings()
        yield from resident()
        if DEVICE.type == "cuda":
            yield from streamed()
        yield from decoding()


def seconds(call: Callable[[], object]) -> float:
    """Time a call, with all that it leaves the device to do; the median of a few."""
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
    length, width = tokens()[0], 3072 if not SMALL else 32
    return 60 * 4 * length**2 * width + 2 * (20 * 12 + 40 * 12) * width**2 * length


def ceilings() -> Iterator[Row]:
    """Measure what the card can do at best."""
    length, width = tokens()[0], 32 if SMALL else 3072
    left = torch.randn(length, width, device=DEVICE).to(DTYPE)
    right = torch.randn(width, 4 * width, device=DEVICE).to(DTYPE)
    flops = 2 * length * width * 4 * width
    yield Row("matmul", flops / seconds(lambda: left @ right) / 1e12, None, "TFLOP/s", "the ceiling")
    size = 1 << (20 if SMALL else 30)
    there = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    rates = {}
    for pinned in (False, True):
        here = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and DEVICE.type == "cuda")
        rates[pinned] = size / seconds(partial(there.copy_, here, non_blocking=True)) / 1e9
    yield Row("copy to the card, page-locked", rates[True], rates[False], "GB/s", "why blocks are locked")
    query = torch.randn(1, 24, length, 128 if not SMALL else 16, device=DEVICE).to(DTYPE)
    taken = seconds(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    rate = 4 * length**2 * query.shape[1] * query.shape[3] / taken / 1e12
    yield Row("attention, PyTorch's choice", rate, None, "TFLOP/s", "half of a step")


def random_weights(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Give a module from the meta device weights: a pool of random numbers, again and again."""
    pool = torch.randn(1 << 22, device=device).mul_(0.02).to(DTYPE)
    module = module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), pool.numel()):
            part = flat[start : start + pool.numel()]
            part.copy_(pool[: part.numel()])
        if "norm" in name and parameter.ndim == 1:
            parameter.data.fill_(1)
    return module.eval().requires_grad_(requires_grad=False)


class Step:
    """A step of diffusers' forward, and one of ours."""

    def __init__(self, weights_on: torch.device | str) -> None:
        """Make up weights there and inputs on the device."""
        with torch.device("meta"):
            transformer = HunyuanVideoFramepackTransformer3DModel(**CONFIG).to(DTYPE)
        self.transformer: Any = random_weights(transformer, weights_on)
        config: Any = transformer.config

        def made_up(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE).to(DTYPE)

        embeds = made_up(1, PROMPT_TOKENS, config.text_embed_dim)
        self.text = pad_prompt_embeds(embeds, made_up(1, config.pooled_projection_dim))
        self.image = made_up(1, IMAGE_TOKENS, config.image_proj_dim)
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
        core, embedders = take_apart(self.transformer)

        def visit(module: nn.Module) -> Any:
            return memory.visiting(module, device=DEVICE) if DEVICE.type == "cuda" else nullcontext()

        tables = embedders.tables(self.text, self.image, self.steps, self.guidance, visit)
        with visit(core.clean_x_embedder):
            look_back = core.look_back(self.section, self.history)
        return core, lambda: core(self.latents, tables, 0, look_back, None)


def resident() -> Iterator[Row]:
    """Time a step with all weights on the card."""
    step = Step(DEVICE)
    eager = seconds(step.whole)
    if DEVICE.type == "cuda":
        for backend in BACKENDS:
            use_attention(step.transformer, backend)
            yield Row(f"diffusers' forward, {backend}", seconds(step.whole), eager, "s", "attention backends")
        use_attention(step.transformer, "native")
    before = step.whole()
    core, ours = step.take_apart()
    same = float(torch.equal(ours(), before))
    yield Row("a step with tables is equal to the bit", same, 1.0, "", "on this device too")
    yield Row("a step, eager", seconds(ours), eager, "s", "tables and section constants")
    compiled = CompiledBlocks(*core.blocks.transformer_blocks, *core.blocks.single_transformer_blocks)
    if DEVICE.type == "cuda":
        compiled.on = True
        taken = seconds(ours)
        yield Row("a step, compiled blocks", taken, eager, "s", "the default of longer videos")
        error = (ours().float() - before.float()).norm() / before.float().norm()
        yield Row("what compiling changes, relative", error.item(), None, "", "within rounding")
        yield Row(
            "arithmetic of a step, compiled", step_flops() / taken / 1e12, None, "TFLOP/s", "against matmul"
        )
    release()


def streamed() -> Iterator[Row]:
    """Time a step with blocks that are fetched, under caps of the card's memory."""
    step = Step("cpu")
    core, ours = step.take_apart()
    for name, part in core.named_children():
        if name != "blocks":
            part.to(DEVICE)
    blocks = (*core.blocks.transformer_blocks, *core.blocks.single_transformer_blocks)
    streamer = Streamer(blocks, DEVICE, lock=True)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    for cap in CAPS:
        release()
        torch.cuda.set_per_process_memory_fraction((cap - 0.6) * 2**30 / total)  # the rest is CUDA's context
        torch.cuda.reset_peak_memory_stats()
        try:
            with streamer.on_device():
                taken = seconds(ours)
        except torch.OutOfMemoryError:
            yield Row(f"streamed under {cap} GiB", float("nan"), None, "s", "does not fit")
            continue
        peak = torch.cuda.max_memory_reserved() / 2**30
        yield Row(f"streamed under {cap} GiB", taken, None, "s", f"fits: peak {peak:.2f} GiB")
    torch.cuda.set_per_process_memory_fraction(1.0)
    release()


def decoding() -> Iterator[Row]:
    """Time the decode of a steady section, and of one whose neighbour's tiles are kept."""
    config = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8} if SMALL else {}
    with torch.device("meta"):
        decoder = AutoencoderKLHunyuanVideo(**config).to(DTYPE)
    decoder = random_weights(decoder, DEVICE).to(torch.float16 if DEVICE.type == "cuda" else torch.float32)
    latents = torch.randn(1, 16, 2 * WINDOW, HEIGHT // 8, WIDTH // 8)
    for tile in (None, 256):
        memory.set_tiles(decoder, tile)
        taken = seconds(lambda: vae.decode(latents, decoder))
        yield Row(
            f"decoding a section, {'tiles' if tile else 'whole frames'}", taken, None, "s", "without reuse"
        )
    release()


def release() -> None:
    """Give back what is no longer used."""
    gc.collect()
    memory.release_unused(DEVICE)


if __name__ == "__main__":
    for row in rows():
        print(row)
