"""Defines a request: the settings of a video, checked once, on construction.

Names are those of diffusers' pipelines. Nothing here imports torch.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from framepack_core.prompts import TimedPrompts

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


class GenerationSettings(BaseModel):
    """How a video is to be made; defaults and ranges are FramePack's own.

    Raises:
        pydantic.ValidationError: a value is of the wrong type or outside its range;
            :func:`framepack_core.mistakes.explain` puts it in plain words.
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
    # None: the resolution the model was made for, 640 for the published ones.
    resolution: Integer | None = Field(None, ge=64, le=2048)
    # What is seen where a picture is transparent: "#rrggbb", in sRGB.
    background: Annotated[str, BeforeValidator(_read_colour)] = WHITE
    prompts: TimedPrompts = ()  # elsewhere the prompt itself holds

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
    sha256: str | None = None  # of what the file must hold; None: whatever it holds
    allow_partial: bool = False  # merge what fits, even if keys of blocks belong nowhere


class Request(GenerationSettings):
    """One video to generate.

    ``keyframes`` maps section numbers, counted in generation order (0 is made first: the end of the
    video), to pictures. All pictures are resized and cropped to the size chosen for ``image``.

    ``continue_from`` is a video to go on with, which takes a model of kind ``f1``: its latents (.safetensors,
    with float32 of (1, 16, T, h, w) under the name "latents"), which say what size it has, or an mp4. Then
    ``seconds`` is what is added, the times of ``prompts`` count from where the video ends, and ``image`` is
    the picture that it began with.
    """

    image: Path
    prompt: str
    seed: Integer = Field(31337, ge=0, le=MAX_SEED)
    end_image: Path | None = None
    keyframes: dict[Annotated[int, Field(ge=0)], Path] = {}
    loras: tuple[Lora, ...] = ()
    continue_from: Path | None = None
