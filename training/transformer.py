"""Train the transformer: HunyuanVideoFramepackTransformer3DModel, small, for both directions at once.

    python -m training.transformer small PICTURES RUN --iterations 2000
    python -m training.transformer middle PICTURES RUN --iterations 2500
    python -m training.transformer whole PICTURES RUN --iterations 8800

or, on two cores, with ``torchrun --nproc-per-node 2 -m training.transformer`` in place of ``python -m
...``.

The stages ``small`` and ``middle`` learn the velocity of the flow from the true motion with noise. A sampler
that follows it draws one of the videos that the model holds possible; with a model this small they differ by
a lot, and none of them is the true one. But there is only one: picture and sentence decide every frame. So
the stage ``whole`` follows the sampler's own way from noise, a step or two, and learns from there what is
true: later steps correct the earlier ones instead of embellishing them.
"""

import os
import random
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import click
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import distributed
from torch.nn import functional

from framepack_core.sections import HISTORY_1X, HISTORY_2X, HISTORY_4X, Kind, Section, plan
from training.run import Run
from training.samples import MAX_TOKENS, WINDOW, Layout, Sample, Samples, Shape
from training.text import IMAGE_DIM, POOLED_DIM, TEXT_DIM
from training.vae import see_stills_in_2d


@dataclass(frozen=True)
class Stage:
    """A part of training, with weights of its own."""

    shapes: dict[Shape, int]  # samples of each in a batch
    odds: tuple[int, ...]  # how often each shape is trained
    after: str | None  # the stage whose weights it begins with
    rollouts: bool  # whether it follows the sampler's own way


STAGES = {
    "small": Stage({(64, 64): 16}, (1,), None, rollouts=False),
    "middle": Stage({(128, 128): 6}, (1,), "small", rollouts=False),
    # Last it sees the shapes that it is used with: where the middle is, it can only know from these.
    "whole": Stage(
        {(96, 96): 10, (128, 128): 6, (192, 192): 2, (160, 240): 2, (240, 160): 2},
        (5, 9, 2, 2, 2),
        "middle",
        rollouts=True,
    ),
}
CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 1,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "rope_axes_dim": (16, 24, 24),
    "has_image_proj": True,
    "image_proj_dim": IMAGE_DIM,
    "has_clean_x_embedder": True,
    "guidance_embeds": True,
}
# How often sections of each kind and place are trained: the place is counted from the picture.
SHARES: dict[Layout, float] = {
    ("f1", 0): 0.5,  # with all places: their indices are the same
    ("framepack", 0): 0.26,
    ("framepack", 1): 0.13,
    ("framepack", 2): 0.06,
    ("framepack", 3): 0.05,
}


@cache
def section_of(kind: Kind, place: int) -> Section:
    """Give the indices of a section, counted from the picture."""
    sections = plan(kind, 4, WINDOW)
    return sections[0] if kind == "f1" else sections[-1 - place]


def conditions(kind: Kind, place: int, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Give all that the model is told of samples of one layout, but the noisy latents."""
    section = section_of(kind, place)
    start = torch.stack([sample.start.float() for sample in samples])
    history = torch.stack([sample.history.float() for sample in samples])
    # What it will look back on was made by itself: it is never quite right, and never quite sharp.
    flat = functional.pad(history.flatten(0, 2), (1, 1, 1, 1), mode="replicate")
    soft = functional.avg_pool2d(flat, 3, stride=1).view_as(history)
    history = history.lerp(soft, 0.6 * random.random())
    history = history + 0.08 * random.random() * torch.randn_like(history) * (history != 0)
    if kind == "f1":
        history_4x, history_2x, nearest = history.split([HISTORY_4X, HISTORY_2X, HISTORY_1X], 2)
    else:
        nearest, history_2x, history_4x = history.split([HISTORY_1X, HISTORY_2X, HISTORY_4X], 2)
    texts = torch.zeros(len(samples), MAX_TOKENS, TEXT_DIM)
    mask = torch.zeros(len(samples), MAX_TOKENS, dtype=torch.bool)
    for row, sample in enumerate(samples):
        texts[row, : len(sample.text)] = sample.text
        mask[row, : len(sample.text)] = True
    strength = 10_000.0 if random.random() < 0.5 else random.uniform(1_000, 20_000)
    return {
        "encoder_hidden_states": texts,
        "encoder_attention_mask": mask,
        "pooled_projections": torch.zeros(len(samples), POOLED_DIM),
        "image_embeds": torch.stack([sample.image.float() for sample in samples]),
        "indices_latents": torch.tensor(section.indices_latents),
        "guidance": torch.full((len(samples),), strength),
        "latents_clean": torch.cat([start, nearest], 2),
        "indices_latents_clean": torch.tensor(section.indices_latents_clean),
        "latents_history_2x": history_2x,
        "indices_latents_history_2x": torch.tensor(section.indices_latents_history_2x),
        "latents_history_4x": history_4x,
        "indices_latents_history_4x": torch.tensor(section.indices_latents_history_4x),
    }


def velocity(
    model: HunyuanVideoFramepackTransformer3DModel,
    told: dict[str, torch.Tensor],
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
) -> torch.Tensor:
    """Have the model say where noisy latents (B, 16, 9, h, w) go."""
    with torch.autocast("cpu", torch.bfloat16):
        found: torch.Tensor = model(hidden_states=noisy, timestep=1000 * sigmas, **told).sample
    return found.float()


@torch.no_grad()
def follow(
    model: HunyuanVideoFramepackTransformer3DModel,
    told: dict[str, torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
) -> torch.Tensor:
    """Go from noise to latents of these noise levels (B,), in one step or two."""
    latents, now = noise, torch.ones_like(sigmas)
    ways = [sigmas]
    if random.random() < 0.4:
        ways.insert(0, sigmas + (1 - sigmas) * torch.rand(len(sigmas)))
    for following in ways:
        step = (following - now).view(-1, 1, 1, 1, 1)
        latents, now = latents + step * velocity(model, told, latents, now), following
    return latents


class Progress:
    """How large the error of the first steps is, as a share of that of a picture that does not move."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, error: float, still: float) -> None:
        """Take in mean squared errors of a sample: of what is made, and of the start repeated."""
        ours, theirs = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = 0.98 * ours + error, 0.98 * theirs + still

    def told(self) -> dict[str, float]:
        """Give the shares."""
        return {
            name: round(ours / max(theirs, 1e-9), 3) for name, (ours, theirs) in sorted(self._sums.items())
        }


def optimizers(model: torch.nn.Module, rate: float) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Have Muon train the matrices of the blocks, and AdamW the rest."""
    in_blocks = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "_blocks" in name and "norm" not in name
    ]
    ours = {id(weight) for weight in in_blocks}
    others = [weight for weight in model.parameters() if id(weight) not in ours]
    muon = torch.optim.Muon(
        [{"params": in_blocks, "scale": 2.0}], lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=1e-3)
    return muon, adam


@click.command()
@click.argument("stage", type=click.Choice(list(STAGES)))
@click.argument("pictures", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--iterations", type=int, required=True)
@click.option("--fresh", type=int, default=2, help="New samples an iteration.")
@click.option("--rate", type=float, default=1e-3)
def main(stage: str, pictures: Path, folder: Path, iterations: int, fresh: int, rate: float) -> None:
    """Train one stage."""
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    shapes, odds, after, rollouts = astuple(STAGES[stage])
    torch.manual_seed(0)
    random.seed(stage)
    see_stills_in_2d(slice(-1, None))
    samples = Samples(pictures, folder)
    model = HunyuanVideoFramepackTransformer3DModel(**CONFIG)
    if after is not None:
        model.load_state_dict(torch.load(folder / f"transformer-{after}.pt"))
    torch._dynamo.config.recompile_limit = 4 * len(shapes)  # each with gradients and without
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(dynamic=False)
    muon, adam = optimizers(model, rate)
    run, progress = Run(folder / f"transformer-{stage}", model, muon, adam), Progress()
    random.seed(f"{stage} {run.iteration} {rank}")
    torch.manual_seed(random.getrandbits(40))
    for iteration in run.to(iterations, rate=rate, warm_up=100, decay=0.6):
        # The same in all processes, which wait for each other: it decides how long an iteration takes.
        by = random.Random(iteration)
        (kind, place), shape = (
            by.choices(list(SHARES), list(SHARES.values()))[0],
            by.choices(list(shapes), odds)[0],
        )
        chosen = samples.batch((kind, place), shape, shapes[shape], fresh)
        target = torch.stack([sample.target.float() for sample in chosen])
        drawn = torch.rand(len(chosen))
        drawn = torch.where(torch.rand(len(chosen)) < 0.5, 0.65 + 0.35 * drawn, drawn)
        sigmas = 1.9 * drawn / (1 + 0.9 * drawn)
        noise = torch.randn_like(target)
        told = conditions(kind, place, chosen)
        if rollouts:
            sigmas = torch.where(torch.rand(len(chosen)) < 0.3, torch.ones(1), sigmas.clamp(min=0.15))
            noisy = follow(model, told, noise, sigmas)
        share = sigmas.view(-1, 1, 1, 1, 1)
        if not rollouts:
            noisy = (1 - share) * target + share * noise
        found = velocity(model, told, noisy, sigmas)
        error = (noisy - share * found - target).pow(2).mean((1, 2, 3, 4))
        # What counts is where the way ends; as a velocity the error of low noise would weigh far more.
        run.step((error if rollouts else error / sigmas.pow(2)).mean())
        for row, sample in enumerate(chosen):
            if rollouts or sigmas[row] > 0.9:
                still = (sample.start.float() - target[row]).pow(2)
                progress.add(sample.motion, error[row].item(), still.mean().item())
                progress.add(f"{kind} {place}", error[row].item(), still.mean().item())
        if iteration % 50 == 0:
            run.note(error=progress.told())
    if run.first:
        with run.averaged():
            torch.save(model.state_dict(), folder / f"transformer-{stage}.pt")


if __name__ == "__main__":
    main()
