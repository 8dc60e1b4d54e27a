"""Defines a request: the settings of a video and its timed prompts, checked on construction.

Names are those of diffusers' pipelines. No torch here.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

WHITE = "#ffffff"
MAX_SEED = 2**32 - 1  # what the published programs draw from


def _refuse_bool(value: object) -> object:
    """Keep ``steps = true`` from being read as 1."""
    if isinstance(value, bool):
        # Not TypeError: pydantic reports ValueErrors, with the key.
        raise ValueError("must be a number, not true or false")  # noqa: TRY004 - see above
    return value


def _read_colour(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch("#[0-9A-Fa-f]{6}", value):
        raise ValueError('must be a colour as "#rrggbb", of which "#ffffff" is white and "#000000" black')
    return value.lower()


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]


class TimedPrompt(BaseModel):
    """A prompt for a span of the finished video, in seconds: ``from``, ``to``, ``text``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True
    )

    start: float = Field(alias="from", ge=0, strict=True)
    end: float = Field(alias="to", ge=0, strict=True)
    text: str

    @property
    def span(self) -> str:
        """The span as messages write it."""
        return f"from = {self.start:g}, to = {self.end:g}"


def _check_spans(prompts: tuple[TimedPrompt, ...]) -> tuple[TimedPrompt, ...]:
    for prompt in prompts:
        if prompt.start >= prompt.end:
            raise ValueError(f"hold {prompt.span}, where 'to' must be greater than 'from'")
        if not prompt.text.strip():
            raise ValueError(f"hold an empty text ({prompt.span}): write one, or leave the entry out")
    for one, other in pairwise(sorted(prompts, key=lambda prompt: prompt.start)):
        if other.start < one.end:
            raise ValueError(
                f"hold {one.span} and {other.span}, which overlap: end the one where the other begins"
            )
    return prompts


TimedPrompts = Annotated[tuple[TimedPrompt, ...], AfterValidator(_check_spans)]


class GenerationSettings(BaseModel):
    """The settings of a video; defaults and ranges are FramePack's own.

    Raises:
        pydantic.ValidationError: a value is of the wrong type or outside its range;
            :func:`framepack_core.mistakes.explain` says it in plain words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    negative_prompt: str = ""
    seconds: Number = Field(5.0, ge=1, le=120)
    latent_window_size: Integer = Field(9, ge=1, le=33)
    steps: Integer = Field(25, ge=1, le=100)
    true_cfg_scale: Number = Field(1.0, ge=1, le=32)
    guidance_scale: Number = Field(10.0, ge=1, le=32)
    guidance_rescale: Number = Field(0.0, ge=0, le=1)
    cache: Literal["none", "teacache", "magcache"] = "none"
    width: Integer | None = Field(None, ge=32, le=4096, multiple_of=16)
    height: Integer | None = Field(None, ge=32, le=4096, multiple_of=16)
    # None: the resolution that the model was trained for, 640 for the published ones.
    resolution: Integer | None = Field(None, ge=64, le=2048)
    # The colour behind the transparent parts of a picture: "#rrggbb", in sRGB.
    background: Annotated[str, BeforeValidator(_read_colour)] = WHITE
    prompts: TimedPrompts = ()  # outside their spans the prompt of the request acts

    @model_validator(mode="after")
    def _width_and_height_belong_together(self) -> Self:
        if (self.width is None) != (self.height is None):
            given, missing = ("width", "height") if self.height is None else ("height", "width")
            raise ValueError(f"{given} is set and {missing} is not: set both, or neither")
        return self


class Lora(BaseModel):
    """A LoRA file to merge into the transformer, and how strongly."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: Path
    weight: Number = Field(1.0, ge=-4, le=4)
    sha256: str | None = None  # that the file must have; None: any
    allow_partial: bool = False  # merge the keys that match, even if some keys of blocks do not


class Request(GenerationSettings):
    """One video to generate.

    ``keyframes`` maps section numbers, counted in generation order (0 is made first: the end of the
    video), to pictures. All pictures are resized and cropped to the size chosen for ``image``.

    ``continue_from`` is a video to extend, with a model of kind ``f1``: an mp4, or its saved latents
    (.safetensors with "latents", float32 (1, 16, T, h, w)), which also give the size. Then ``seconds`` is the
    length of what is added, the times of ``prompts`` count from the end of the video, and ``image`` is the
    picture that the video began with.
    """

    image: Path
    prompt: str
    seed: Integer = Field(31337, ge=0, le=MAX_SEED)
    end_image: Path | None = None
    keyframes: dict[Annotated[int, Field(ge=0)], Path] = {}
    loras: tuple[Lora, ...] = ()
    continue_from: Path | None = None


@dataclass(frozen=True)
class Cut:
    """A prompt that is too long for a text encoder."""

    text: str  # the whole prompt
    encoder: Literal["llama", "clip"]
    tokens: int  # of the whole prompt
    taken: int  # tokens that the encoder reads
    dropped: str  # the first words that the encoder does not read whole
