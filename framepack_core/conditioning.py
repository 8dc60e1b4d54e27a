"""Encodes a request's texts and pictures; reuses what recent requests have encoded."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import safetensors.torch
import torch

from framepack_core.errors import RequestError
from framepack_core.media import extend, video_reader
from framepack_core.media.extend import LATENT_PIXELS
from framepack_core.media.pictures import Picture, crop_to, open_picture
from framepack_core.media.sizes import Size, output_size
from framepack_core.memory import devices
from framepack_core.memory.footprint import TILE
from framepack_core.memory.placement import Places
from framepack_core.networks import encoders, loading, vae
from framepack_core.networks.encoders import TextConditioning
from framepack_core.networks.transformer import Precomputed
from framepack_core.request import Cut, Request
from framepack_core.sections import Kind, sections_of

Source = TypeVar("Source")
Result = TypeVar("Result")
KEPT = 8  # a prompt takes 4 MB, a picture 2


@dataclass(frozen=True)
class Conditioning:
    """The encoded inputs of a video; latents are float32 on the CPU."""

    positive: TextConditioning
    negative: TextConditioning | None  # only if the true CFG scale is not 1
    image_embeds: torch.Tensor  # (1, tokens, C)
    start_latents: torch.Tensor  # (1, 16, 1, h, w)
    end_latents: torch.Tensor | None = None
    keyframe_latents: Mapping[int, torch.Tensor] = field(default_factory=dict)
    timed: tuple[TextConditioning, ...] = ()  # of the timed prompts
    existing: "ExistingVideo | None" = None

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The prompts that are too long, and for which encoder."""
        texts = (self.positive, *([self.negative] if self.negative else []), *self.timed)
        return tuple(dict.fromkeys(cut for text in texts for cut in text.cuts))


@dataclass(frozen=True)
class ExistingVideo:
    """A video that the request extends; tensors on the CPU."""

    latents: torch.Tensor  # (1, 16, T, h, w), float32: of the whole video, or of its end
    pixels: torch.Tensor | None = None  # (1, 3, T', H, W): its last frames; None: decode the latents

    def sections(self, window: int) -> int:
        """Count the sections that made it, without the picture or frame that it began with."""
        return extend.sections_taken(self.latents.shape[2], window)


class Encoders:
    """The text encoders, the image encoder and the VAE's encoder, with their most recent results."""

    def __init__(self, models: loading.Models, places: Places) -> None:
        """Use a model's components; ``places`` moves them."""
        self._models = models
        self._places = places
        # Side of the VAE's tiles in pixels. Pictures are small; their latents must not depend on the memory
        # level.
        self.tile: int | None = None
        self._texts = Recent[TextConditioning]()
        self._image_embeds = Recent[torch.Tensor]()
        self._posteriors = Recent[torch.Tensor]()

    @torch.inference_mode()
    def encode(self, request: Request) -> Conditioning:
        """Encode the request's texts and pictures; recent results are reused."""
        self._models.spec.verify(
            end_image=bool(request.end_image),
            keyframes=bool(request.keyframes),
            continues=request.continue_from is not None,
        )
        picture = open_picture(request.image, request.background)
        size = output_size(request, picture.shape[:2], self._models.spec.buckets)
        existing = None
        if request.continue_from is not None:
            existing = self._existing_video(request, request.continue_from, size)
            size = existing.latents.shape[3] * LATENT_PIXELS, existing.latents.shape[4] * LATENT_PIXELS
        others = [*([request.end_image] if request.end_image else []), *request.keyframes.values()]
        opened = (open_picture(path, request.background) for path in others)  # one in memory at a time
        pictures = [crop_to(picture, size) for picture in itertools.chain([picture], opened)]
        prompts = [request.prompt, *(timed.text for timed in request.prompts)]
        if request.true_cfg_scale != 1:
            prompts.append(request.negative_prompt)
        digests = [f"{picture.shape} {hashlib.sha256(picture.tobytes()).hexdigest()}" for picture in pictures]
        named = {f"{self.tile} {digest}": picture for digest, picture in zip(digests, pictures, strict=True)}
        named_texts = {prompt: prompt for prompt in prompts}
        texts = dict(zip(named_texts, self._texts.all(named_texts, self._encode_prompts), strict=True))
        (image_embeds,) = self._image_embeds.all({digests[0]: pictures[0]}, self._encode_images)
        posteriors = dict(zip(named, self._posteriors.all(named, self._encode_pictures), strict=True))
        latents = [self._draw(posteriors[f"{self.tile} {digest}"], request.seed) for digest in digests]
        start = latents.pop(0)
        end = latents.pop(0) if request.end_image else None
        return Conditioning(
            positive=texts[request.prompt],
            negative=texts[request.negative_prompt] if request.true_cfg_scale != 1 else None,
            image_embeds=image_embeds,
            start_latents=start,
            end_latents=end,
            keyframe_latents=dict(zip(request.keyframes, latents, strict=True)),
            timed=tuple(texts[timed.text] for timed in request.prompts),
            existing=existing,
        )

    def _existing_video(self, request: Request, path: Path, size: Size) -> ExistingVideo:
        """Read the video to extend: its saved latents, or its last frames, encoded."""
        if path.suffix.lower() == ".safetensors":
            latents = continued_latents(path)
            own = (latents.shape[3] * LATENT_PIXELS, latents.shape[4] * LATENT_PIXELS)
            if request.width is not None and size != own:
                raise RequestError(
                    f"{path.name} is of {own[1]}x{own[0]}, what is added cannot be of {size[1]}x{size[0]}: "
                    "leave width and height out, or leave out the latents"
                )
            return ExistingVideo(latents)
        frames = video_reader.last_frames(path, size)
        # Always in tiles: 73 frames take much memory, and their latents must not depend on the memory level.
        devices.set_tiles(self._models.vae, TILE)
        with self._places.on_device(self._models.vae):
            latents = self._draw(vae.encode(frames, self._models.vae), request.seed)
        count = extend.remade(latents.shape[2], request.latent_window_size)
        return ExistingVideo(latents, vae.to_pixels(frames[-count:]))

    def _draw(self, posterior: torch.Tensor, seed: int) -> torch.Tensor:
        """Draw latents with a new generator, so that they depend on the seed alone."""
        scaling = self._models.vae.config.scaling_factor
        return vae.draw(posterior, scaling, torch.Generator("cpu").manual_seed(seed), self._places.device)

    def _encode_prompts(self, prompts: list[str]) -> list[TextConditioning]:
        models = self._models
        parts = (models.text_encoder, models.tokenizer, models.text_encoder_2, models.tokenizer_2)
        with self._places.on_device(models.text_encoder, models.text_encoder_2):
            return [encoders.encode_prompt(prompt, *parts, self._places.device) for prompt in prompts]

    def _encode_images(self, pictures: list[Picture]) -> list[torch.Tensor]:
        encoder, processor = self._models.image_encoder, self._models.image_processor
        with self._places.on_device(encoder):
            return [encoders.encode_image(picture, encoder, processor) for picture in pictures]

    def _encode_pictures(self, pictures: list[Picture]) -> list[torch.Tensor]:
        devices.set_tiles(self._models.vae, self.tile)
        with self._places.on_device(self._models.vae):
            return [vae.encode(picture[None], self._models.vae) for picture in pictures]


def continued_latents(path: Path) -> torch.Tensor:
    """Read the saved latents of a video, (1, 16, T, h, w), float32.

    Raises:
        RequestError: the file holds something else, or numbers that are not finite.
    """
    extend.latents_shape(path)
    latents = safetensors.torch.load_file(path)["latents"]
    if not latents.isfinite().all():
        raise RequestError(f"{path.name} holds numbers that are not finite: {extend.NO_LATENTS}")
    return latents


class SectionTexts:
    """The text of each section, and what is precomputed for the current prompt: 4 MB per step."""

    def __init__(
        self,
        request: Request,
        conditioned: Conditioning,
        kind: Kind,
        sections: int,
        precompute: Callable[[TextConditioning], Precomputed],
    ) -> None:
        """Assign a prompt to each of ``sections`` sections; ``precompute`` is called once per prompt."""
        self._texts = [conditioned.positive] * sections
        window = request.latent_window_size
        acting = sections_of(request.prompts, kind, sections, window, asked=request.seconds)
        for timed, numbers in zip(conditioned.timed, acting, strict=True):
            for number in numbers:
                self._texts[number] = timed
        self._negative = conditioned.negative
        self._precompute = precompute
        self._positive: TextConditioning | None = None  # the text of the "positive" entry
        self._precomputed: dict[str, Precomputed] = {}

    def precomputed(self, section: int) -> Mapping[str, Precomputed]:
        """Give what is precomputed for a section, by guidance branch."""
        if self._texts[section] is not self._positive:
            self._precomputed.pop("positive", None)  # first: it takes memory on the device
            self._positive = self._texts[section]
            self._precomputed["positive"] = self._precompute(self._positive)
        if self._negative is not None and "negative" not in self._precomputed:
            self._precomputed["negative"] = self._precompute(self._negative)
        return self._precomputed


class Recent(Generic[Result]):
    """The most recently used results, by what they were made of."""

    def __init__(self, kept: int = KEPT) -> None:
        """Begin empty; ``kept`` is the largest number of results."""
        self._kept = kept
        self._results: dict[str, Result] = {}

    def all(
        self, wanted: Mapping[str, Source], make: Callable[[list[Source]], Iterable[Result]]
    ) -> list[Result]:
        """Give the results of all sources and make the missing ones; the keys of ``wanted`` identify them."""
        missing = {name: source for name, source in wanted.items() if name not in self._results}
        if missing:
            self._results |= zip(missing, make(list(missing.values())), strict=True)
        self._results |= {name: self._results.pop(name) for name in wanted}  # moved to the end: used last
        results = [self._results[name] for name in wanted]
        for name in list(self._results)[: -self._kept]:
            del self._results[name]
        return results
