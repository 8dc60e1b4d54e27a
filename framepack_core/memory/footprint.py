"""Predicts the peak of GPU memory: weights from their files, activations from measurements.

Two kinds of activations grow with the picture: the transformer's with its tokens, the VAE's with the pixels
that it decodes at once. No torch here.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from framepack_core.errors import ModelError
from framepack_core.media.sizes import Size
from framepack_core.models.lora_files import fit_all
from framepack_core.models.model_files import Stored, look
from framepack_core.models.registry import ModelSpec, find
from framepack_core.request import GenerationSettings, Lora

GIB = 1 << 30
Placement = Literal["all", "core", "partly", "streamed"]
Precision = Literal["exact", "fp8", "nf4"]  # of the blocks' weights
Tiling = bool | Literal["auto"]

TILE, SMALL_TILE = 256, 128  # pixels: the VAE's default, and the smallest without obvious seams

CONTEXT = 700 << 20  # bytes: CUDA's context and the libraries' workspaces
SLACK = 1.1  # of what comes and goes: the allocator loses some of it to gaps
TOKEN_BYTES = 113_200  # of activations at the transformer's peak: 1.93 GiB for 640x608's 18325 tokens
TOKEN_CACHE_BYTES = 3 * 3072 * 2  # that TeaCache keeps per token
STEP_BYTES = 4 << 20  # precomputed per step: 2.2 MB of modulation, 1.6 MB of refined text
DECODE_BYTES = 39_800  # per pixel of the tile, five latent frames at a time: 14.4 GiB for 640x608
FRAME_BYTES = 2 * 3 * 2  # per pixel of each decoded frame, half precision, before and after joining tiles
SLOTS = 2  # for streamed layers: the one that computes, and the next
TEXT_BYTES = 300 << 20  # activations of the text encoder
TEXT_TOKENS, IMAGE_TOKENS = 256, 729


@dataclass(frozen=True)
class MemoryLevel:
    """One way to use the device's memory; the next level takes less memory and more time."""

    tile: int | None  # side of the VAE's tiles in pixels; None: frames are decoded whole
    # What stays on the device. all: everything; core: the sampling loop's part of the transformer and the
    # VAE; partly: as many blocks as fit, during sampling; streamed: nothing.
    placement: Placement

    @property
    def text(self) -> str:
        """The level in words."""
        decoding = f"decoding in tiles of {self.tile} pixels" if self.tile else "decoding whole frames"
        placed = {
            "all": "everything stays on the device",
            "core": "the sampling loop stays on the device, the rest comes when it is used",
            "partly": "blocks that do not fit on the device streamed",
            "streamed": "weights streamed block by block",
        }
        return f"{decoding}, {placed[self.placement]}"


def memory_levels(tiling: Tiling, video: "Video", *, streamable: bool = True) -> tuple[MemoryLevel, ...]:
    """List the levels to try in order; only the VAE's tiles change pixels, slightly."""
    placements: tuple[Placement, ...] = ("all", "core", "partly", "streamed")
    if not streamable:
        placements = ("all", "core")
    if tiling is False:
        return tuple(MemoryLevel(None, placement) for placement in placements)
    tiled = (
        *(MemoryLevel(TILE, placement) for placement in placements),
        MemoryLevel(SMALL_TILE, placements[-1]),
    )
    return tiled if tiling is True or not video.decodable_whole else (MemoryLevel(None, "all"), *tiled)


@dataclass(frozen=True)
class Component:
    """A part of the model, in parameters."""

    parameters: int
    largest: int  # the most parameters that move at once when it is moved piece by piece
    stored_bytes: int  # in its files
    item_bytes: int  # of one parameter in its files


@dataclass(frozen=True)
class Weights:
    """The parts of a model."""

    core: Component  # the part of the transformer that the sampling loop needs
    embedders: Component  # the rest of the transformer, used once a video
    text_encoder: Component
    text_encoder_2: Component
    image_encoder: Component
    vae: Component
    on_disk: bool = True  # False: the model is not here, and these are the published sizes


CORE_BYTES = {"fp8": 1.003, "nf4": 0.54}  # per parameter of the core, whose norms and last layer stay wide


class ItemBytes(NamedTuple):
    """Bytes of a loaded parameter, by part of the model."""

    core: float = 2
    transformer: int = 2
    others: int = 2
    # False with 4-bit weights: streaming moves tensors, and their scales are not tensors of the module.
    streamable: bool = True

    @classmethod
    def of(cls, transformer: int, others: int, precision: str = "exact") -> "ItemBytes":
        """Take the bytes of the transformer's and the other parts' dtypes, and the blocks' precision."""
        core = CORE_BYTES.get(precision, transformer)
        return cls(core, transformer, others, streamable=precision != "nf4")

    def __call__(self, part: str) -> float:
        """Give the bytes of a parameter of a part."""
        return {"core": self.core, "embedders": self.transformer}.get(part, self.others)


HALF = ItemBytes()


def _published(parameters: float, largest: float, item_bytes: int = 2) -> Component:
    return Component(int(parameters), int(largest), int(parameters * item_bytes), item_bytes)


PUBLISHED = Weights(
    core=_published(9.075e9, 226.6e6),
    embedders=_published(3.799e9, 271.4e6),
    text_encoder=_published(7.505e9, 218.1e6),
    text_encoder_2=_published(0.123e9, 0.123e9),
    image_encoder=_published(0.428e9, 0.428e9),
    vae=_published(0.2465e9, 0.2465e9, item_bytes=4),
    on_disk=False,
)


@dataclass(frozen=True)
class Video:
    """The properties of a video on which its memory depends."""

    height: int
    width: int
    window: int = 9
    steps: int = 25
    cached: bool = False  # whether a step cache keeps residuals
    branches: int = 1  # 2 with a true CFG scale

    @classmethod
    def asked_for(cls, settings: GenerationSettings, size: Size) -> "Video":
        """Take them from settings and a size (height, width)."""
        return cls(
            *size,
            window=settings.latent_window_size,
            steps=settings.steps,
            cached=settings.cache != "none",
            branches=1 if settings.true_cfg_scale == 1 else 2,
        )

    @property
    def decodable_whole(self) -> bool:
        """Whether the VAE can decode whole frames: PyTorch's kernels take at most 2^31 numbers.

        The largest tensor has 256 channels and 17 frames, padded by two frames and by a pixel on each side.
        """
        return 256 * 19 * (self.height + 2) * (self.width + 2) < 1 << 31

    @property
    def tokens(self) -> int:
        """The transformer's tokens: latents, history, picture, and the longest text."""
        height, width = self.height // 8, self.width // 8
        full = (self.window + 2) * (height // 2) * (width // 2)
        halves = math.ceil(height / 4) * math.ceil(width / 4)
        quarters = 4 * math.ceil(height / 8) * math.ceil(width / 8)
        return full + halves + quarters + IMAGE_TOKENS + TEXT_TOKENS


def weights(spec: ModelSpec) -> Weights:
    """Read a model's sizes from the headers of its files; the published sizes if they are not here.

    Raises:
        ModelError: a file is damaged.
    """
    try:
        find(spec)
    except ModelError:
        return PUBLISHED
    held = {part: list(_tensors(found)) for part, found in look(spec).items()}
    tensors = held["transformer"]
    embedders = [tensor for tensor in tensors if _is_embedder(tensor[0])]
    return Weights(
        core=_component([tensor for tensor in tensors if not _is_embedder(tensor[0])], _block),
        embedders=_component(embedders, _embedder),
        text_encoder=_text_encoder(held["text_encoder"]),
        text_encoder_2=_component(held["text_encoder_2"]),
        image_encoder=_component(held["image_encoder"]),
        vae=_component(held["vae"]),
    )


Tensor = tuple[str, int, int]  # name, parameters, bytes of one parameter


def _tensors(found: Stored) -> Iterator[Tensor]:
    for name, tensor in found.tensors.items():
        yield name, tensor.parameters, tensor.nbytes // max(tensor.parameters, 1)


def _is_embedder(name: str) -> bool:
    embedders = ("time_text_embed.", "context_embedder.", "image_projection.")
    return name.startswith(embedders) or _is_modulation(name)


def _is_modulation(name: str) -> bool:
    return any(f"{norm}.linear." in name for norm in ("norm", "norm1", "norm1_context", "norm_out"))


def changed(loras: Sequence[Lora], spec: ModelSpec) -> dict[str, int]:
    """Count the parameters that LoRAs change, by part of the model.

    Raises:
        RequestError: a LoRA cannot be read, or does not fit.
        ModelError: the model's files are missing or damaged.
    """
    weights = {name: size for fit in fit_all(loras, spec) for name, size in fit.changed.items()}
    sums = Counter[str]()
    for name, parameters in weights.items():
        sums["embedders" if _is_embedder(name) else "core"] += parameters
    return dict(sums)


def _text_encoder(tensors: list[Tensor]) -> Component:
    """Add up the tensors of Llama, of which only layers move."""
    layers = [tensor for tensor in tensors if tensor[0].startswith("layers.")]
    return replace(_component(tensors), largest=_component(layers, _block).largest)


def _block(name: str) -> str:
    """Name the block or layer of a weight: the first two parts of the weight's name."""
    return ".".join(name.split(".")[:2])


def _embedder(name: str) -> str:
    """Name the embedder of a weight; each modulation is one."""
    return name.rpartition(".")[0] if _is_modulation(name) else name.partition(".")[0]


def _component(tensors: list[Tensor], moves_with: Callable[[str], str] = lambda _: "") -> Component:
    """Add tensors up; tensors for which ``moves_with`` gives the same name move at once."""
    groups = Counter[str]()
    widths = Counter[int]()  # weighted by parameters, not by tensors
    for name, count, size in tensors:
        widths[size] += count
        groups[moves_with(name)] += count
    return Component(
        parameters=sum(count for _, count, _ in tensors),
        largest=max(groups.values(), default=0),
        stored_bytes=sum(count * size for _, count, size in tensors),
        item_bytes=max(widths, key=widths.__getitem__, default=2),
    )


def peak_vram(weights: Weights, level: MemoryLevel, video: Video, item_bytes: ItemBytes = HALF) -> int:
    """Predict the peak on the card, in bytes; without the blocks that stay while others are streamed."""
    size = {name: part.parameters * item_bytes(name) for name, part in parts(weights)}
    largest = {name: part.largest * item_bytes(name) for name, part in parts(weights)}
    precomputed = _precomputed(video)
    sampling = _sampling(video, item_bytes)
    decoding = _decoding(level.tile, video) * item_bytes.others / 2
    if level.placement == "all":
        stays, comes = sum(size.values()), [sampling, decoding + precomputed]
    else:
        visits = [
            largest["text_encoder"] * SLOTS + TEXT_BYTES,
            size["text_encoder_2"] + TEXT_BYTES,
            size["image_encoder"],
            largest["embedders"] + precomputed,
        ]
        if level.placement == "core":
            stays, comes = size["core"] + size["vae"], [sampling, decoding + precomputed, *visits]
        else:
            streaming = SLOTS * largest["core"] + sampling
            stays, comes = 0, [streaming, size["vae"] + decoding + precomputed, *visits]
    return int(stays + max(comes) * SLACK + CONTEXT)


def vram_beside_streaming(weights: Weights, video: Video, free: int, item_bytes: ItemBytes = HALF) -> int:
    """Predict the bytes left for blocks that stay during sampling, while others are streamed."""
    streaming = SLOTS * weights.core.largest * item_bytes("core") + _sampling(video, item_bytes)
    return int(free - streaming * SLACK - CONTEXT)


def _precomputed(video: Video) -> int:
    return video.steps * STEP_BYTES * video.branches


def _sampling(video: Video, item_bytes: ItemBytes) -> float:
    """Predict the bytes that a step takes in addition to the weights."""
    a_token = TOKEN_BYTES + TOKEN_CACHE_BYTES * video.branches * video.cached
    return video.tokens * a_token * item_bytes.transformer / 2 + _precomputed(video)


def _decoding(tile: int | None, video: Video) -> int:
    pixels = video.height * video.width
    frames = 8 * video.window - 3  # two sections are decoded together, to blend them
    return min(tile**2 if tile else pixels, pixels) * DECODE_BYTES + pixels * frames * FRAME_BYTES


def parts(weights: Weights) -> Iterator[tuple[str, Component]]:
    """Give the parts of a model by name."""
    yield from ((name, part) for name, part in vars(weights).items() if isinstance(part, Component))
