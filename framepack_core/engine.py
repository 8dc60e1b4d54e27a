"""From a request to a video: the page to read first.

Three altitudes: :meth:`Engine.sample` is the video, ``_sample_section`` one section, and
:func:`framepack_core.sampling.sample_unipc` the steps of a section.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import nn

from framepack_core import conditioning, loading, memory, vae
from framepack_core.buckets import output_size
from framepack_core.cache import StepCache, TeaCache
from framepack_core.conditioning import TextConditioning
from framepack_core.history import History, HistoryContext, Shared, prefix_for
from framepack_core.magcache import BUILT_IN_RATIOS, Calibration, MagCache, load_ratios
from framepack_core.media import Frames, Picture, crop_to, open_picture
from framepack_core.models import ModelSpec
from framepack_core.precision import Precision, reduce
from framepack_core.progress import Progress
from framepack_core.recent import Recent
from framepack_core.request import Request
from framepack_core.sampling import Denoiser, flow_sigmas, sample_unipc, schedule_mu
from framepack_core.sections import Section, plan, section_count
from framepack_core.transformer import Tables, guidance, take_apart, timesteps


@dataclass(frozen=True)
class Step:
    """A sampling step is done."""

    section: int  # from 0, in generation order
    sections: int
    step: int  # steps done in this section
    steps: int
    denoised: torch.Tensor  # (1, 16, W, h, w), float32: what the section looks like by now
    computed: bool  # whether the blocks were computed, or a cache stood in for them
    progress: Progress  # what to resume from; its tensors lie where the model computes


@dataclass(frozen=True)
class Clip:
    """A section is decoded and joined to the video."""

    section: int
    sections: int
    latents: torch.Tensor  # (1, 16, T, h, w), float32 on the CPU: all of the video so far
    history: torch.Tensor  # (1, 16, T', h, w), float32 on the CPU: the buffer that sections look back on
    frames: Frames  # (T, H, W, 3), uint8: those that no later section changes; see sections.chronological
    finite: bool  # whether all their pixels were numbers
    still: Picture  # the section's own last frame
    progress: Progress  # what to resume from


@dataclass(frozen=True)
class Conditioning:
    """Everything that stays the same for the whole video; latents float32 on the CPU."""

    positive: TextConditioning
    negative: TextConditioning | None  # only where the true CFG scale is not 1
    image_embeds: torch.Tensor  # (1, tokens, C)
    start_latents: torch.Tensor  # (1, 16, 1, h, w)
    end_latents: torch.Tensor | None = None
    keyframe_latents: Mapping[int, torch.Tensor] = field(default_factory=dict)


class Engine:
    """A loaded model that generates videos, one at a time."""

    def __init__(self, models: loading.Models, device: torch.device, precision: Precision = "exact") -> None:
        """Take loaded components; they are moved to the device when they are needed.

        Raises:
            ModelError: a library that ``precision`` takes is not installed.
        """
        self.models = models
        self.device = device
        weights = memory.weight_bytes(
            models.transformer, models.text_encoder, models.text_encoder_2, models.vae, models.image_encoder
        )
        resident = memory.keeps_resident(device, weights)
        # Tiles as the reference below 60 GiB; they change pixels slightly.
        self.rungs = memory.ladder(memory.Rung(None if resident else memory.TILE, resident))
        self.rung = 0
        self._texts = Recent[TextConditioning]()
        self._image_embeds = Recent[torch.Tensor]()
        self._posteriors = Recent[torch.Tensor]()
        self.core, self.embedders = take_apart(models.transformer)
        reduce(self.core.blocks, precision, models.dtype)
        self.take_rung(0)

    @classmethod
    def load(
        cls, spec: ModelSpec, device: str = "auto", dtype: str = "auto", precision: Precision = "exact"
    ) -> "Engine":
        """Load a model; on a GPU in the reference's dtypes, on the CPU in float32 unless told otherwise.

        Raises:
            ModelError: a file is missing or not what it should be, or the device is not there.
        """
        chosen = memory.choose_device(device)
        memory.release_unused(chosen)  # of a model that was loaded before
        transformer_dtype, encoder_dtype = memory.choose_dtypes(chosen, dtype)
        return cls(
            loading.load(spec, dtype=transformer_dtype, encoder_dtype=encoder_dtype), chosen, precision
        )

    def take_rung(self, number: int) -> bool:
        """Use as little memory as a rung of the ladder says; False if only a newly loaded engine can."""
        rung = self.rungs[min(number, len(self.rungs) - 1)]
        if self.rungs[self.rung].streamed and not rung.streamed:
            return False
        models = self.models
        streamed = (self.core.blocks, models.text_encoder, models.text_encoder_2)
        if rung.streamed and not self.rungs[self.rung].streamed:
            memory.stream(*streamed, device=self.device)
        self.rung = self.rungs.index(rung)
        if not rung.resident:
            parts = (*vars(models).values(), *self.core.children(), *self.embedders.children())
            for module in parts:
                if (
                    isinstance(module, nn.Module)
                    and module is not models.transformer  # its parts are the core's
                    and not (rung.streamed and module in streamed)
                ):
                    module.to("cpu")
            memory.release_unused(self.device)
        return True

    def generate(self, request: Request, resume: Progress | None = None) -> Iterator[Step | Clip]:
        """Generate a video: yields every step, and a clip after every section. Leave the loop to cancel.

        With ``resume``, the progress of an event of the same request, what follows that event is generated,
        and is the same to the bit.

        Raises:
            RequestError: a picture cannot be read, or the model cannot do what is asked.
        """
        yield from self.sample(request, self.encode(request), resume)

    @torch.inference_mode()
    def encode(self, request: Request) -> Conditioning:
        """Encode the request's text and pictures, as far as none of the last jobs had the same."""
        self.models.spec.verify(end_image=bool(request.end_image), keyframes=bool(request.keyframes))
        picture = open_picture(request.image)
        size = output_size(request, picture.shape[:2], self.models.spec.buckets)
        others = [*([request.end_image] if request.end_image else []), *request.keyframes.values()]
        pictures = [crop_to(picture, size), *(crop_to(open_picture(path), size) for path in others)]
        prompts = [request.prompt, *([request.negative_prompt] if request.true_cfg_scale != 1 else [])]
        digests = [_digest(picture) for picture in pictures]
        named = dict(zip(digests, pictures, strict=True))
        texts = self._texts.all({prompt: prompt for prompt in prompts}, self._encode_prompts)
        (image_embeds,) = self._image_embeds.all({digests[0]: pictures[0]}, self._encode_images)
        posteriors = dict(zip(named, self._posteriors.all(named, self._encode_pictures), strict=True))
        # A generator of its own for each picture: the draw depends on the seed and on nothing before it.
        latents = [
            vae.draw(
                posteriors[digest],
                self.models.vae.config.scaling_factor,
                torch.Generator("cpu").manual_seed(request.seed),
                self.device,
            )
            for digest in digests
        ]
        start = latents.pop(0)
        end = latents.pop(0) if request.end_image else None
        return Conditioning(
            positive=texts[0],
            negative=texts[-1] if request.true_cfg_scale != 1 else None,
            image_embeds=image_embeds,
            start_latents=start,
            end_latents=end,
            keyframe_latents=dict(zip(request.keyframes, latents, strict=True)),
        )

    @torch.inference_mode()
    def sample(
        self,
        request: Request,
        conditioned: Conditioning,
        resume: Progress | None = None,
        *,
        new_cache: Callable[[], StepCache | None] | None = None,
    ) -> Iterator[Step | Clip]:
        """Generate a video from what :meth:`encode` gave; with ``new_cache``, another than the request's."""
        new_cache = new_cache or self._caches(request)
        kind, window = self.models.spec.kind, request.latent_window_size
        sections = plan(kind, section_count(request.seconds, window), window)
        history = History(kind, window, conditioned.start_latents, conditioned.end_latents)
        progress = resume or Progress.start(request.seed)
        height, width = conditioned.start_latents.shape[-2:]
        sigmas = flow_sigmas(request.steps, schedule_mu(window * height * width // 4))
        tables: dict[str, Tables] = {}
        if len(progress.sampled) < len(sections):
            tables = self._tables(request, conditioned, sigmas)
        tiles = vae.Tiles()  # no part of the progress: where they are missing they are decoded again
        for section, following in zip_longest(sections, sections[1:]):
            if section.index == len(progress.sampled):
                prefix = prefix_for(section, conditioned.start_latents, conditioned.keyframe_latents)
                progress = yield from self._sample_section(
                    request,
                    tables,
                    sigmas,
                    section,
                    len(sections),
                    history.context(prefix),
                    progress,
                    new_cache(),
                )
            history.append(section, progress.sampled[section.index])
            if section.index < progress.decoded:
                continue
            shared = history.shared(section, following) if following else None
            clip = self._decode(history, section, len(sections), progress, tiles, shared)
            progress = clip.progress
            yield clip
            del clip  # its frames: a section more is sampled before there are others

    def calibrate(self, request: Request) -> Generator[Step, None, list[float]]:
        """Make one section, and measure in it what MagCache goes by: how the blocks' effect changes a step.

        Yields the steps; returns the ratios.
        """
        calibration = Calibration(request.steps)
        for event in self.sample(request, self.encode(request), new_cache=lambda: calibration):
            if isinstance(event, Step):
                yield event
            if len(calibration.ratios) == request.steps:
                break
        return calibration.ratios

    def _caches(self, request: Request) -> Callable[[], StepCache | None]:
        """Say how the cache of a section is made."""
        if request.cache == "teacache":
            return lambda: TeaCache(request.steps)
        if request.cache == "magcache":
            spec = self.models.spec
            ratios = load_ratios(spec.mag_ratios) if spec.mag_ratios else BUILT_IN_RATIOS[spec.kind]
            return lambda: MagCache(request.steps, ratios)
        return lambda: None

    def _tables(self, request: Request, conditioned: Conditioning, sigmas: torch.Tensor) -> dict[str, Tables]:
        """Compute what is the same in every section, by guidance branch."""
        dtype, device = self.models.dtype, self.device
        branches = {"positive": conditioned.positive}
        if conditioned.negative is not None:
            branches["negative"] = conditioned.negative
        return {
            name: self.embedders.tables(
                text.to(device, dtype),
                conditioned.image_embeds.to(device, dtype),
                timesteps(sigmas, dtype).to(device),
                guidance(request.guidance_scale, dtype).to(device),
                self._on_device,
            )
            for name, text in branches.items()
        }

    def _sample_section(
        self,
        request: Request,
        tables: Mapping[str, Tables],
        sigmas: torch.Tensor,
        section: Section,
        sections: int,
        history: HistoryContext,
        progress: Progress,
        cache: StepCache | None,
    ) -> Generator[Step, None, Progress]:
        """Sample one section, from its start or from where it was left; returns the progress it makes."""
        dtype = self.models.dtype
        generator = torch.Generator("cpu")
        generator.set_state(progress.noise)
        size = history.latents_clean.shape[-2:]
        noise = torch.randn((1, 16, request.latent_window_size, *size), generator=generator)
        with self._on_device(self.core):
            look_back = self.core.look_back(
                section, HistoryContext(*(latents.to(self.device, dtype) for latents in history))
            )
            denoiser = Denoiser(
                lambda latents, step, branch: self.core(latents, tables[branch], step, look_back, cache),
                sigmas,
                true_cfg_scale=request.true_cfg_scale,
                guidance_rescale=request.guidance_rescale,
                dtype=dtype,
                cache=cache,
            )
            resumed = progress.to(self.device)
            if cache is not None and resumed.cache is not None:
                denoiser.restore_cache(resumed.cache)
            for solver in sample_unipc(denoiser, noise.to(self.device), sigmas, resumed.solver):
                denoised = solver.denoised[-1]
                progress = replace(progress, solver=solver, cache=cache.state() if cache else None)
                if solver.step == request.steps:
                    sampled = (*progress.sampled, denoised.cpu())
                    noise_after = generator.get_state()
                    progress = replace(progress, sampled=sampled, noise=noise_after, solver=None, cache=None)
                computed = cache is None or cache.computed()[-1]
                yield Step(section.index, sections, solver.step, request.steps, denoised, computed, progress)
        return progress

    def _decode(
        self,
        history: History,
        section: Section,
        sections: int,
        progress: Progress,
        tiles: vae.Tiles,
        shared: Shared | None,
    ) -> Clip:
        """Decode a section and join it to the video; no pixels but the edge stay on the device."""
        kind, overlap = self.models.spec.kind, 4 * len(section.indices_latents) - 3
        memory.set_tiles(self.models.vae, self.rungs[self.rung].tile)
        with self._on_device(self.models.vae):
            decoded = vae.decode(history.decodable(section), self.models.vae, tiles, shared)
        settled, edge = vae.join(kind, progress.edge, decoded, overlap, is_last=section.is_last)
        return Clip(
            section=section.index,
            sections=sections,
            latents=history.video,
            history=history.latents,
            frames=vae.to_uint8(settled),
            finite=bool(settled.isfinite().all()),
            still=vae.to_uint8(decoded[:, :, history.still_index(section)].unsqueeze(2))[0],
            progress=replace(progress, decoded=section.index + 1, edge=edge),
        )

    def _encode_prompts(self, prompts: list[str]) -> list[TextConditioning]:
        models = self.models
        encoders = (models.text_encoder, models.tokenizer, models.text_encoder_2, models.tokenizer_2)
        with self._on_device(models.text_encoder, models.text_encoder_2):
            return [conditioning.encode_prompt(prompt, *encoders) for prompt in prompts]

    def _encode_images(self, pictures: list[Picture]) -> list[torch.Tensor]:
        encoder, processor = self.models.image_encoder, self.models.image_processor
        with self._on_device(encoder):
            return [conditioning.encode_image(picture, encoder, processor) for picture in pictures]

    def _encode_pictures(self, pictures: list[Picture]) -> list[torch.Tensor]:
        # Pictures are small, and what they become must not depend on how far down the ladder it went.
        memory.set_tiles(self.models.vae, self.rungs[0].tile)
        with self._on_device(self.models.vae):
            return [vae.encode(picture, self.models.vae) for picture in pictures]

    def _on_device(self, *modules: nn.Module) -> AbstractContextManager[None]:
        rung = self.rungs[self.rung]
        if rung.streamed:  # these are moved by hooks of their own
            hooked = (self.core.blocks, self.models.text_encoder, self.models.text_encoder_2)
            modules = tuple(self.core.children()) if modules == (self.core,) else modules
            modules = tuple(module for module in modules if module not in hooked)
        return memory.on_device(*modules, device=self.device, resident=rung.resident)


def _digest(picture: Picture) -> str:
    return f"{picture.shape} {hashlib.sha256(picture.tobytes()).hexdigest()}"
