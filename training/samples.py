"""What the transformer is trained with: samples of sections, made of photographs, motions and sentences.

A sample is a section of a video: where it lies in the video, what it looks back on (in both directions
exactly what framepack_core gives it), a sentence, and the latents of every fourth frame of the true motion.
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaModel, PreTrainedTokenizerFast, SiglipVisionModel

from framepack_core.networks.encoders import TEMPLATE, TEMPLATE_TOKENS, TEXT_LAYER
from framepack_core.sections import HISTORY_FRAMES, Kind
from training.crops import Crops
from training.motions import MOTIONS, OTHERWISE, render
from training.pictures import load
from training.prompts import draw
from training.vae import Skeleton, build

Layout = tuple[Kind, int]  # and the place of the section, counted from the picture
Shape = tuple[int, int]  # height, width in pixels

WINDOW = 9
SENTENCES = 1500  # for each motion; drawn anew whenever training goes on
POOL = 600  # samples of a layout and shape that are kept, to be seen more than once
MAX_TOKENS = 32  # all texts are filled up to these: a compiled model wants one shape
END_FRAMES = 0.1  # of framepack's samples
# What is hard to learn is seen more often.
WEIGHTS = (
    dict.fromkeys((*MOTIONS, OTHERWISE), 1.0)
    | dict.fromkeys(("zoom in", "rotate left", "rotate right", "black and white"), 2.0)
    | dict.fromkeys(("ripple", "zoom out", OTHERWISE), 3.0)
    | dict.fromkeys(("night falls", "sunset", "fog"), 0.5)
)


def any_motion() -> str:
    """Draw a motion."""
    return random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


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

    def __init__(self, pictures: Path, run: Path) -> None:
        """Make them of the pictures and of what a run learnt before."""
        self._crops = Crops(list(load(pictures, held_out=False).values()), (72, 96, 128, 192, 256, 384))
        self._skeleton = Skeleton(build())
        self._skeleton.load_state_dict(torch.load(run / "skeleton.pt"))
        self._texts = Texts(run / "text")
        self._image_encoder = SiglipVisionModel.from_pretrained(run / "text/image_encoder/image_encoder")
        self._image_encoder = self._image_encoder.float().eval()
        self.mean, self.std = self._statistics(run / "latents.pt")
        self._pools: defaultdict[tuple[Layout, Shape], list[Sample]] = defaultdict(list)

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
    def make(self, layout: Layout, shape: Shape) -> Sample:
        """Make a sample of a section."""
        kind, place = layout
        picture = self._crops.one(*shape)
        motion = any_motion()
        longest = 2 if min(shape) < 96 else 4  # sections; a small picture is soon left behind
        if kind == "f1":
            place = random.choices(range(longest), (0.5, 0.25, 0.15, 0.1)[:longest])[0]
        sections = random.randint(place + 1, max(longest, place + 1))
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
            motion = any_motion()  # is only said
        else:
            times, where = torch.tensor(inside).unique(return_inverse=True)
            with torch.autocast("cpu", torch.bfloat16):
                encoded = self._skeleton.encode(render(picture, motion, 4 * times)).float()
            latents = self._whiten(encoded)[:, where]
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
        shape = picture.shape[1], picture.shape[2]
        other = render(self._crops.one(*shape), random.choice(MOTIONS), torch.tensor([random.randint(0, 40)]))
        both = self._whiten(self._skeleton.encode(torch.cat([picture[None], other])))
        shares = torch.cat([shares[:-1], torch.ones(1)]).view(1, -1, 1, 1)
        return both[:, :1] * (1 - shares) + both[:, 1:] * shares

    def _whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """From (T, 16, 1, h, w) to (16, T, h, w), whitened."""
        return (latents[:, :, 0].transpose(0, 1) - self.mean) / self.std

    def batch(self, layout: Layout, shape: Shape, count: int, fresh: int) -> list[Sample]:
        """Give samples, ``fresh`` of them new."""
        pool = self._pools[layout, shape]
        for _ in range(fresh if len(pool) >= 3 * count else count):
            sample = self.make(layout, shape)
            if len(pool) < POOL:
                pool.append(sample)
            else:
                pool[random.randrange(POOL)] = sample
        return random.sample(pool, count)
