"""What to generate: the settings of a video, checked once, on construction.

Names are those of diffusers' pipelines. Nothing here imports torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le, MultipleOf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from framepack_core.prompts import TimedPrompts

MAX_MISTAKES = 10  # told in one message
MAX_SHOWN = 100  # characters of a wrong value in a message
MAX_SEED = 2**32 - 1  # what the published programs draw from


def _refuse_bool(value: object) -> object:
    """Keep ``steps = true`` from being read as 1."""
    if isinstance(value, bool):
        # Not TypeError: pydantic reports ValueErrors, with the key.
        raise ValueError("must be a number, not true or false")  # noqa: TRY004 - see above
    return value


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]


class GenerationSettings(BaseModel):
    """How a video is to be made; defaults and ranges are FramePack's own.

    Raises:
        pydantic.ValidationError: a value is of the wrong type or outside its range;
            :func:`explain` puts it in plain words.
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


def explain(error: ValidationError, fields: type[BaseModel]) -> str:
    """Say in one line per mistake which key is wrong, its value and what it may be."""
    mistakes = [_explain_one(dict(mistake), fields) for mistake in error.errors()[:MAX_MISTAKES]]
    more = error.error_count() - len(mistakes)
    return "; ".join([*mistakes, f"and {more} more mistakes"] if more else mistakes)


def _explain_one(mistake: dict[str, Any], fields: type[BaseModel]) -> str:
    location = [str(part) for part in mistake["loc"]]
    key = ".".join(part for part in location if part not in ("int", "float", "str"))
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {shown(key)}"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    allowed = _allowed(location[0], fields)
    said = f"must be {allowed}" if allowed else message[:1].lower() + message[1:]
    return f"{key} {said}, got {shown(mistake['input'])}"


def shown(value: object) -> str:
    """Write a value out for a message, as Python would, but not at any length or depth.

    >>> shown("x" * 1000) == repr("x" * 1000)[:100] + "…"
    True
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; tables in tables without end
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _allowed(key: str, fields: type[BaseModel]) -> str:
    """Spell out the range of a field: ``1 to 120``."""
    field = fields.model_fields.get(key)
    if field is None:
        return ""
    low = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    high = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    step = next((m.multiple_of for m in field.metadata if isinstance(m, MultipleOf)), None)
    if low is None or high is None:
        return ""
    return f"{low} to {high}" + (f" in steps of {step}" if step else "")
