"""Train the transformer: HunyuanVideoFramepackTransformer3DModel, small, for both directions at once.

    python -m training.transformer PICTURES RUN --size 64 --batch 16 --iterations 3000
    python -m training.transformer PICTURES RUN --size 128 --batch 6 --iterations 1500 --after 64

or, on two cores, with ``torchrun --nproc-per-node 2 -m training.transformer`` in place of ``python -m
...``.

A sample is a section of a video: where it lies in the video, what it looks back on (in both directions
exactly what framepack_core gives it), a sentence, and the latents of every fourth frame of the true motion.
"""

import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import distributed
from torch.nn import functional
from transformers import LlamaModel, PreTrainedTokenizerFast, SiglipVisionModel

from framepack_core.conditioning import TEMPLATE, TEMPLATE_TOKENS, TEXT_LAYER
from framepack_core.sections import HISTORY_1X, HISTORY_2X, HISTORY_4X, HISTORY_FRAMES, Kind, Section, plan
from training.crops import Crops
from training.motions import MOTIONS, OTHERWISE, render
from training.pictures import load
from training.prompts import draw
from training.run import Run
from training.text import IMAGE_DIM, POOLED_DIM, TEXT_DIM
from training.vae import Skeleton, build

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
WINDOW = 9
SENTENCES = 500  # for each motion; drawn anew whenever training goes on
POOL = 1200  # samples of a layout that are kept, to be seen more than once
MAX_TOKENS = 32  # all texts are filled up to these: a compiled model wants one shape
# How often sections of each kind and place are trained: the place is counted from the picture.
SHARES: dict[tuple[Kind, int], float] = {
    ("f1", 0): 0.5,  # with all places: their indices are the same
    ("framepack", 0): 0.26,
    ("framepack", 1): 0.13,
    ("framepack", 2): 0.06,
    ("framepack", 3): 0.05,
}
END_FRAMES = 0.12  # of framepack's samples


@dataclass(frozen=True)
class Sample:
    """A section of a video; latents are whitened, (16, T, h, w)."""

    target: torch.Tensor  # T = 9
    start: torch.Tensor  # T = 1
    history: torch.Tensor  # T = 19, in the order of time
    text: torch.Tensor  # (N, 64)
    image: torch.Tensor  # (tokens, 32)
    motion: str


class Texts:
    """The sentences of each motion, encoded."""

    def __init__(self, folder: Path) -> None:
        """Draw them."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base/tokenizer")
        encoder = LlamaModel.from_pretrained(folder / "base/text_encoder").float().eval()
        by = random.Random(random.random())
        self._texts: dict[str, list[torch.Tensor]] = {}
        for motion in (*MOTIONS, OTHERWISE):
            drawn = [draw(None if motion == OTHERWISE else motion, by) for _ in range(SENTENCES)]
            if motion == OTHERWISE:
                drawn += [""] * 25
            self._texts[motion] = []
            for first in range(0, len(drawn), 100):
                tokens = tokenizer(
                    [TEMPLATE.format(text) for text in drawn[first : first + 100]],
                    padding=True,
                    return_tensors="pt",
                )
                with torch.no_grad():
                    states = encoder(**tokens, output_hidden_states=True).hidden_states[TEXT_LAYER]
                lengths = tokens["attention_mask"].sum(1).clamp(max=TEMPLATE_TOKENS + MAX_TOKENS).tolist()
                self._texts[motion] += [
                    state[TEMPLATE_TOKENS:length].half()
                    for state, length in zip(states, lengths, strict=True)
                ]

    def one(self, motion: str) -> torch.Tensor:
        """Give one: (N, 64)."""
        return random.choice(self._texts[motion])


class Samples:
    """Makes samples, and keeps some to be seen again."""

    def __init__(self, pictures: Path, run: Path, size: int) -> None:
        """Make them of crops of ``size`` pixels."""
        sides = [side for side in (72, 96, 128, 192, 256, 384) if size <= side <= 3 * size]
        self._crops = Crops(list(load(pictures, held_out=False).values()), sides)
        self._size = size
        self._longest = 2 if size < 96 else 4  # sections; a small picture is soon left behind
        self._skeleton = Skeleton(build())
        self._skeleton.load_state_dict(torch.load(run / "skeleton.pt"))
        self._texts = Texts(run / "text")
        self._image_encoder = SiglipVisionModel.from_pretrained(run / "text/image_encoder/image_encoder")
        self._image_encoder = self._image_encoder.float().eval()
        self.mean, self.std = self._statistics(run / "latents.pt")
        self._pools: dict[tuple[Kind, int], list[Sample]] = {layout: [] for layout in SHARES}

    @torch.no_grad()
    def _statistics(self, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Give mean and standard deviation of each channel, (16, 1, 1, 1), always the same."""
        if not file.exists():
            latents = self._skeleton.encode(self._crops.many(256, 64))
            mean = latents.mean((0, 2, 3, 4)).view(-1, 1, 1, 1)
            torch.save((mean, latents.std((0, 2, 3, 4)).view(-1, 1, 1, 1)), file)
        mean, std = torch.load(file)
        return mean, std

    @torch.no_grad()
    def make(self, kind: Kind, place: int) -> Sample:
        """Make a sample of a section."""
        picture = self._crops.one(self._size)
        motion = random.choice((*MOTIONS, OTHERWISE))
        if kind == "f1":
            place = random.choices(range(self._longest), (0.5, 0.25, 0.15, 0.1)[: self._longest])[0]
        sections = random.randint(place + 1, max(self._longest, place + 1))
        first = 1 + WINDOW * place  # of its latents
        ends = kind == "framepack" and random.random() < END_FRAMES
        if kind == "f1":
            around = range(first - HISTORY_FRAMES, first)
        else:
            around = range(first + WINDOW, first + WINDOW + HISTORY_FRAMES)
        wanted = [0, *range(first, first + WINDOW), *around]
        inside = [max(min(time, WINDOW * sections), 0) for time in wanted]
        if ends:
            latents = self._fade(picture, torch.tensor(inside) / (WINDOW * sections))
            end = latents[:, -1:]
            motion = random.choice((*MOTIONS, OTHERWISE))
        else:
            times, where = torch.tensor(inside).unique(return_inverse=True)
            latents = self._whiten(self._skeleton.encode(render(picture, motion, 4 * times)))[:, where]
        history = latents[:, 1 + WINDOW :].clone()
        missing = torch.tensor([time != known for time, known in zip(wanted, inside, strict=True)])[
            1 + WINDOW :
        ]
        history[:, missing] = 0
        if ends:
            history[:, int((~missing).sum()) : int((~missing).sum()) + 1] = end
        small = functional.interpolate(picture[None], (64, 64), mode="bicubic", antialias=True)
        return Sample(
            target=latents[:, 1 : 1 + WINDOW].half(),
            start=latents[:, :1].half(),
            history=history.half(),
            text=self._texts.one(motion),
            image=self._image_encoder(small).last_hidden_state[0].half(),
            motion="end frame" if ends else motion,
        )

    def _fade(self, picture: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Give latents of a picture that becomes another, and last those of the other one."""
        other = render(
            self._crops.one(self._size), random.choice(MOTIONS), torch.tensor([random.randint(0, 40)])
        )
        both = self._whiten(self._skeleton.encode(torch.cat([picture[None], other])))
        shares = torch.cat([shares[:-1], torch.ones(1)]).view(1, -1, 1, 1)
        return both[:, :1] * (1 - shares) + both[:, 1:] * shares

    def _whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """From (T, 16, 1, h, w) to (16, T, h, w), whitened."""
        return (latents[:, :, 0].transpose(0, 1) - self.mean) / self.std

    def batch(self, count: int, fresh: int) -> tuple[Kind, int, list[Sample]]:
        """Give samples of one layout, ``fresh`` of them new."""
        kind, place = random.choices(list(SHARES), list(SHARES.values()))[0]
        pool = self._pools[kind, place]
        for _ in range(fresh if len(pool) >= 4 * count else 4 * count):
            sample = self.make(kind, place)
            if len(pool) < POOL:
                pool.append(sample)
            else:
                pool[random.randrange(POOL)] = sample
        return kind, place, random.sample(pool, count)


@cache
def section_of(kind: Kind, place: int) -> Section:
    """Give the indices of a section, counted from the picture."""
    sections = plan(kind, 4, WINDOW)
    return sections[0] if kind == "f1" else sections[-1 - place]


def velocity(
    model: HunyuanVideoFramepackTransformer3DModel,
    kind: Kind,
    place: int,
    samples: list[Sample],
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
) -> torch.Tensor:
    """Have the model say where noisy latents (B, 16, 9, h, w) go."""
    section = section_of(kind, place)
    start = torch.stack([sample.start.float() for sample in samples])
    history = torch.stack([sample.history.float() for sample in samples])
    # What it will look back on was made by itself: it is never quite right.
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
    found: torch.Tensor = model(
        hidden_states=noisy,
        timestep=1000 * sigmas,
        encoder_hidden_states=texts,
        encoder_attention_mask=mask,
        pooled_projections=torch.zeros(len(samples), POOLED_DIM),
        image_embeds=torch.stack([sample.image.float() for sample in samples]),
        indices_latents=torch.tensor(section.indices_latents),
        guidance=torch.full((len(samples),), strength),
        latents_clean=torch.cat([start, nearest], 2),
        indices_latents_clean=torch.tensor(section.indices_latents_clean),
        latents_history_2x=history_2x,
        indices_latents_history_2x=torch.tensor(section.indices_latents_history_2x),
        latents_history_4x=history_4x,
        indices_latents_history_4x=torch.tensor(section.indices_latents_history_4x),
    ).sample
    return found.float()


class Progress:
    """How large the error of the first steps is, as a share of that of a picture that does not move."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, error: torch.Tensor, still: torch.Tensor) -> None:
        """Take in squared errors of a sample: of what is made, and of the start repeated."""
        ours, theirs = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = 0.98 * ours + error.mean().item(), 0.98 * theirs + still.mean().item()

    def told(self) -> dict[str, float]:
        """Give the shares."""
        return {
            name: round(ours / max(theirs, 1e-9), 3) for name, (ours, theirs) in sorted(self._sums.items())
        }


@click.command()
@click.argument("pictures", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=int, required=True)
@click.option("--batch", "count", type=int, required=True)
@click.option("--iterations", type=int, required=True)
@click.option("--fresh", type=int, default=3, help="New samples an iteration.")
@click.option("--rate", type=float, default=1e-3)
@click.option("--after", type=int, help="The size it was trained at before.")
def main(
    pictures: Path,
    folder: Path,
    size: int,
    count: int,
    iterations: int,
    fresh: int,
    rate: float,
    after: int | None,
) -> None:
    """Train at one size of pictures."""
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    torch.manual_seed(size)
    random.seed(size)
    samples = Samples(pictures, folder, size)
    model = HunyuanVideoFramepackTransformer3DModel(**CONFIG)
    if after is not None:
        model.load_state_dict(torch.load(folder / f"transformer-{after}.pt"))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(dynamic=False)
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
    run, progress = Run(folder / f"transformer-{size}", model, muon, adam), Progress()
    random.seed(f"{size} {run.iteration} {rank}")
    torch.manual_seed(random.getrandbits(40))
    for iteration in run.to(iterations, rate=rate, warm_up=100, decay=0.5):
        kind, place, chosen = samples.batch(count, fresh)
        target = torch.stack([sample.target.float() for sample in chosen])
        drawn = torch.rand(count)
        drawn = torch.where(torch.rand(count) < 0.5, 0.65 + 0.35 * drawn, drawn)
        sigmas = 1.9 * drawn / (1 + 0.9 * drawn)
        share = sigmas.view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(target)
        noisy = (1 - share) * target + share * noise
        with torch.autocast("cpu", torch.bfloat16):
            found = velocity(model, kind, place, chosen, noisy, sigmas)
        run.step((found - (noise - target)).pow(2).mean())
        denoised = noisy - share * found.detach()
        for row in torch.nonzero(sigmas > 0.9).flatten().tolist():
            still = (chosen[row].start.float() - target[row]).pow(2)
            progress.add(chosen[row].motion, (denoised[row] - target[row]).pow(2), still)
            progress.add(f"{kind} {place}", (denoised[row] - target[row]).pow(2), still)
        if iteration % 50 == 0:
            run.note(error=progress.told())
    if run.first:
        with run.averaged():
            torch.save(model.state_dict(), folder / f"transformer-{size}.pt")


if __name__ == "__main__":
    main()
