"""Generates a video from a request: the page to read first.

Three levels: :meth:`Engine.sample` makes the video, ``_sample_section`` one section, and
:func:`framepack_core.sampling.unipc.sample_unipc` the steps of a section.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch

from framepack_core.conditioning import Conditioning, Encoders, ExistingVideo, SectionTexts
from framepack_core.history import History, HistoryContext, Shared, prefix_for
from framepack_core.media.pictures import Frames, Picture
from framepack_core.memory import devices, footprint, planning
from framepack_core.memory.footprint import TILE, ItemBytes, Precision, Tiling, Video
from framepack_core.memory.placement import Places
from framepack_core.memory.planning import Plan, PlanError
from framepack_core.models.registry import ModelSpec, find
from framepack_core.networks import loading, vae
from framepack_core.networks.attention import AUTO, choose_attention
from framepack_core.networks.compiling import CompiledBlocks
from framepack_core.networks.encoders import TextConditioning
from framepack_core.networks.lora import Merger
from framepack_core.networks.quantization import reduce
from framepack_core.networks.transformer import Precomputed, guidance, split_transformer, timesteps
from framepack_core.progress import Progress
from framepack_core.request import Lora, Request
from framepack_core.sampling.magcache import Calibration, step_caches
from framepack_core.sampling.step_cache import StepCache
from framepack_core.sampling.unipc import Denoiser, flow_sigmas, sample_unipc, schedule_mu
from framepack_core.sections import Kind, Section, chronological, plan, section_count

log = logging.getLogger(__name__)

PUBLISHED_VIDEO = Video(640, 608)


@dataclass(frozen=True)
class Step:
    """One sampling step is done."""

    section: int  # from 0, in generation order
    sections: int
    step: int  # steps done in this section
    steps: int
    denoised: torch.Tensor  # (1, 16, W, h, w), float32: the current prediction of the section
    computed: bool  # False: the step cache replaced the blocks in every guidance branch
    progress: Progress  # the state to resume from; its tensors are on the model's device


@dataclass(frozen=True)
class Clip:
    """A section is decoded and joined to the video."""

    section: int
    sections: int
    frames: Frames  # (T, H, W, 3), uint8: the frames that no later section changes
    finite: bool  # whether all of their pixels are finite numbers
    still: Picture  # the last frame of the section itself
    progress: Progress  # the state to resume from
    # (1, 16, T, h, w), float32 on the CPU: of the start picture, or of the video that is extended
    start_latents: torch.Tensor
    kind: Kind

    @property
    def latents(self) -> torch.Tensor:
        """All latents of the video so far, (1, 16, T, h, w), float32 on the CPU; a new tensor each time."""
        pieces = chronological(self.kind, self.progress.sampled[: self.progress.decoded])
        begins = self.kind == "f1" or self.progress.decoded == self.sections
        return torch.cat([self.start_latents, *pieces] if begins else [*pieces], dim=2)


Planner = Callable[[Video, int, Mapping[str, int]], Plan]


class Engine:
    """A loaded model that generates videos, one at a time."""

    def __init__(
        self,
        models: loading.Models,
        device: torch.device,
        planner: Planner,
        *,
        pinnable: bool,
        precision: Precision = "exact",
        attention: str = AUTO,
    ) -> None:
        """Take loaded components; they move to the device when they are needed.

        Args:
            models: the components, in host memory.
            device: where to compute.
            planner: plans the memory for a video; also takes the bytes to keep free and the parameters that
                LoRAs change, by part.
            pinnable: whether streamed blocks are kept in page-locked memory.
            precision: of the blocks' weights.
            attention: the backend of the blocks' attention, from :func:`choose_attention`.

        Raises:
            ModelError: a library that ``precision`` needs is not installed.
        """
        self.models = models
        self.device = device
        self.merger = Merger(models.transformer, models.spec, models.dtype)
        self.core, self.embedders = split_transformer(models.transformer)
        blocks = self.core.blocks
        self.compiled = CompiledBlocks(*blocks.transformer_blocks, *blocks.single_transformer_blocks)
        models.transformer.set_attention_backend(attention)
        reduce(self.core.blocks, precision, models.dtype, device)
        self.merger.follow(self.core.blocks)
        self._planner = planner
        self.places = Places(
            device,
            core=self.core,
            blocks=blocks,
            text_encoder=models.text_encoder,
            vae=models.vae,
            pinnable=pinnable,
        )
        self._encoders = Encoders(models, self.places)

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        device: str = "auto",
        dtype: str = "auto",
        precision: Precision = "exact",
        *,
        attention: str = "auto",
        video: Video = PUBLISHED_VIDEO,
        tiling: Tiling = "auto",
        keep_free: int = 0,
        loras: Sequence[Lora] = (),
    ) -> "Engine":
        """Load a model; with ``dtype="auto"`` in the reference's dtypes on a GPU, in float32 on the CPU.

        Args:
            spec: the model.
            device: auto, cpu, cuda:0 ...
            dtype: of the transformer.
            precision: of its blocks' weights.
            attention: the backend of its attention, by diffusers' name.
            video: the first video, for the memory plan.
            tiling: of the VAE; ``auto``: as the reference, whole frames where more than 60 GiB are free.
            keep_free: bytes of the device to leave to other programs.
            loras: of the first video; they are merged when it is made.

        Raises:
            ModelError: a file is missing or wrong, or the device is not there.
            RequestError: a LoRA cannot be read, or does not fit.
            PlanError: the model does not fit into the memory of this machine.
        """
        chosen = devices.choose_device(device)
        devices.release_unused(chosen)  # memory of a model that was loaded before
        dtypes = devices.choose_dtypes(chosen, dtype)
        attention = choose_attention(attention, chosen)
        find(spec)  # report a missing file here: footprint.weights would assume the published sizes
        weights, host = footprint.weights(spec), planning.host_memory()

        def plan(video: Video, keep_free: int, changed: Mapping[str, int]) -> Plan:
            return planning.make_plan(
                weights,
                devices.card(chosen),
                host,  # measured before the model is loaded
                video,
                tiling=tiling,
                keep_free=keep_free,
                item_bytes=ItemBytes.of(dtypes[0].itemsize, dtypes[1].itemsize, precision),
                changed=changed,
            )

        first = plan(video, keep_free, footprint.changed(loras, spec))
        _accept(first)
        models = loading.load(spec, dtype=dtypes[0], encoder_dtype=dtypes[1], precision=precision)
        engine = cls(models, chosen, plan, pinnable=first.pinnable, precision=precision, attention=attention)
        engine.prepare(video, keep_free, loras=loras)
        return engine

    def prepare(self, video: Video, keep_free: int = 0, level: int = 0, loras: Sequence[Lora] = ()) -> None:
        """Plan the memory for a video; ``level`` is the lowest memory level, by number, that may be used.

        Raises:
            RequestError: a LoRA cannot be read, or does not fit.
            PlanError: it does not fit into the memory of this machine.
        """
        plan = self._planner(video, keep_free, footprint.changed(loras, self.models.spec))
        _accept(plan)
        self.levels, self._room = plan.levels, plan.room
        # Pictures are small, and their latents must not depend on the memory level.
        self._encoders.tile = plan.levels[plan.level].tile and TILE
        self.take_level(max(plan.level, level))

    def take_level(self, number: int) -> None:
        """Use as little memory as memory level ``number`` says; the last one if there are fewer."""
        self.level = min(number, len(self.levels) - 1)
        self.places.take(self.levels[self.level], self._room)

    def generate(self, request: Request, resume: Progress | None = None) -> Iterator[Step | Clip]:
        """Generate a video: yields every step, and a clip after every section. Leave the loop to cancel.

        If the request extends a video, the clips begin before its end, by the number of frames that
        :func:`framepack_core.media.extend.remade` gives, and fade in over the last of these.

        ``resume`` is the progress of an earlier event of the same request: generation continues after that
        event, with the same bits.

        Raises:
            RequestError: a picture cannot be read, or the model cannot do what is asked.
        """
        yield from self.sample(request, self.encode(request), resume)

    def encode(self, request: Request) -> Conditioning:
        """Encode the request's texts and pictures; recent results are reused.

        Raises:
            RequestError: a picture cannot be read, or the model cannot do what is asked.
        """
        return self._encoders.encode(request)

    @torch.inference_mode()
    def sample(
        self,
        request: Request,
        conditioned: Conditioning,
        resume: Progress | None = None,
        *,
        new_cache: Callable[[], StepCache | None] | None = None,
    ) -> Iterator[Step | Clip]:
        """Generate a video from the result of :meth:`encode`; ``new_cache`` replaces the request's cache.

        Raises:
            RequestError: a LoRA cannot be read, has changed, or does not fit.
        """
        new_cache = new_cache or step_caches(request, self.models.spec)
        kind, window = self.models.spec.kind, request.latent_window_size
        sections = plan(kind, section_count(request.seconds, window), window)
        existing = conditioned.existing
        known = existing.latents if existing else None
        history = History(kind, window, conditioned.start_latents, conditioned.end_latents, known)
        progress = resume or Progress.start(request.seed)
        height, width = conditioned.start_latents.shape[-2:]
        sigmas = flow_sigmas(request.steps, schedule_mu(window * height * width // 4))
        precompute = partial(self._precompute, request, conditioned, sigmas)
        texts = SectionTexts(request, conditioned, kind, len(sections), precompute)
        if len(progress.sampled) < len(sections):
            self.merger.merge(request.loras, self.places)
        tiles = vae.Tiles()  # not saved in the progress: after a resume they are decoded again
        for section, following in zip_longest(sections, sections[1:]):
            if section.index == len(progress.sampled):
                prefix = prefix_for(section, conditioned.start_latents, conditioned.keyframe_latents)
                progress = yield from self._sample_section(
                    request,
                    texts.precomputed(section.index),
                    sigmas,
                    section,
                    len(sections),
                    history.context(prefix),
                    progress,
                    new_cache(),
                    skipped=existing.sections(window) if existing and section.index == 0 else 0,
                )
            history.append(section, progress.sampled[section.index])
            if section.index < progress.decoded:
                continue
            if existing and section.index == 0:
                progress = replace(progress, edge=self._edge(existing, window))
            shared = history.shared(section, following) if following else None
            clip = self._decode(history, section, len(sections), progress, tiles, shared)
            progress = clip.progress
            yield clip
            del clip  # frees its frames while the next section is sampled

    def calibrate(self, request: Request) -> Generator[Step, None, list[float]]:
        """Make one section and measure MagCache's ratios: how the blocks' residual changes per step.

        Yields the steps; returns the ratios, one per step.
        """
        calibration = Calibration(request.steps)
        for event in self.sample(request, self.encode(request), new_cache=lambda: calibration):
            if isinstance(event, Step):
                yield event
            if len(calibration.ratios) == request.steps:
                break
        return calibration.ratios

    def _precompute(
        self, request: Request, conditioned: Conditioning, sigmas: torch.Tensor, text: TextConditioning
    ) -> Precomputed:
        """Compute what is the same in every section that has this text; ``sigmas`` are the noise levels."""
        dtype, device = self.models.dtype, self.device
        precomputed = self.embedders.precompute(
            text.to(device, dtype),
            conditioned.image_embeds.to(device, dtype),
            timesteps(sigmas, dtype).to(device),
            guidance(request.guidance_scale, dtype).to(device),
            self.places.for_a_moment,
        )
        if self.levels[self.level].placement != "all":
            devices.release_unused(device)
        return precomputed

    def _sample_section(
        self,
        request: Request,
        precomputed: Mapping[str, Precomputed],
        sigmas: torch.Tensor,
        section: Section,
        sections: int,
        history: HistoryContext,
        progress: Progress,
        cache: StepCache | None,
        *,
        skipped: int,
    ) -> Generator[Step, None, Progress]:
        """Sample one section from the progress given; returns the progress after it.

        ``skipped``: how many sections the extended video has; their noise is drawn and discarded.
        """
        dtype = self.models.dtype
        generator = torch.Generator("cpu")
        generator.set_state(progress.noise)
        size = history.latents_clean.shape[-2:]
        for _ in range(1 + skipped):
            noise = torch.randn((1, 16, request.latent_window_size, *size), generator=generator)
        with self.places.on_device(self.core):
            tokens = self.core.history_tokens(
                section, HistoryContext(*(latents.to(self.device, dtype) for latents in history))
            )
            denoiser = Denoiser(
                lambda latents, step, branch: self.core(latents, precomputed[branch], step, tokens, cache),
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
                computed = cache is None or cache.computed_last
                yield Step(section.index, sections, solver.step, request.steps, denoised, computed, progress)
        return progress

    def _edge(self, existing: ExistingVideo, window: int) -> torch.Tensor:
        """Give the last pixels of the video that is extended, as its own generation left them."""
        if existing.pixels is not None:
            return existing.pixels
        devices.set_tiles(self.models.vae, self.levels[self.level].tile)
        with self.places.on_device(self.models.vae):
            return vae.end_of(existing.latents, window, self.models.vae)

    def _decode(
        self,
        history: History,
        section: Section,
        sections: int,
        progress: Progress,
        tiles: vae.Tiles,
        shared: Shared | None,
    ) -> Clip:
        """Decode a section and join it to the video; its pixels leave the device."""
        kind, overlap = self.models.spec.kind, 4 * len(section.indices_latents) - 3
        devices.set_tiles(self.models.vae, self.levels[self.level].tile)
        with self.places.on_device(self.models.vae):
            decoded = vae.decode(history.decodable(section), self.models.vae, tiles, shared)
        settled, edge = vae.join(kind, progress.edge, decoded, overlap, is_last=section.is_last)
        edge = None if edge is None else edge.cpu()  # frees device memory while the next section is sampled
        return Clip(
            section=section.index,
            sections=sections,
            frames=vae.to_uint8(settled),
            finite=bool(settled.isfinite().all()),
            still=vae.to_uint8(decoded[:, :, history.still_index(section)].unsqueeze(2))[0],
            progress=replace(progress, decoded=section.index + 1, edge=edge),
            start_latents=history.start,
            kind=kind,
        )


def _accept(plan: Plan) -> None:
    log.info("memory plan: %s", plan.text)
    if plan.shortage is not None:
        if plan.hopeless:
            raise PlanError(plan.shortage)
        log.warning("%s; trying anyway", plan.shortage)
