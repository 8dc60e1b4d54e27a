"""Defines a job's settings: of its video, and what the daemon does with the result.

Settings come in layers: the config, the ``_defaults.toml`` of each folder, ``NAME.toml``. Each layer is
checked alone, so that a mistake is reported with the file that it is in.
"""

import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from framepack_core.errors import RequestError
from framepack_core.mistakes import Also, explain, shown
from framepack_core.request import MAX_SEED, GenerationSettings, Integer, Number
from framepackd.files import open_regular
from framepackd.settings.decoding import as_text
from framepackd.settings.loras import LoraSettings

DEFAULTS_FILE = "_defaults.toml"
MAX_SETTINGS_BYTES = 1 << 13  # for the worst of 64 KiB tomllib takes 17 s and 4 GB, for this 0.1 s and 64 MB
# The names in FramePack's own demo and in scripts written for it.
OTHER_NAMES = {
    "n_prompt": "negative_prompt",
    "total_second_length": "seconds",
    "cfg": "true_cfg_scale",
    "gs": "guidance_scale",
    "rs": "guidance_rescale",
    "mp4_crf": "crf",
    "use_teacache": "cache",
    "use_random_seed": "seed",
}


MEANT = {name: name for name in OTHER_NAMES}  # hinted at when mistyped
_BOOLEAN = TypeAdapter(bool)


def _read_seed(value: object) -> object:
    return None if value == "random" else value


def _read_keyframes(value: object) -> dict[int, str]:
    """Check a table of section numbers and plain names of files."""
    if not isinstance(value, dict):
        # Not TypeError: pydantic reports ValueErrors, with the key.
        raise ValueError(  # noqa: TRY004 - see above
            f'must be a table of sections and pictures, as {{ "0" = "pose.png" }}, got {shown(value)}'
        )
    read: dict[int, str] = {}
    for section, file in value.items():
        if not re.fullmatch("[0-9]{1,9}", str(section)):
            raise ValueError(
                f'must count sections from 0, as in {{ "0" = "pose.png" }}; {shown(section)} is none'
            )
        if not isinstance(file, str) or not re.fullmatch(r"[^./\\\0][^/\\\0]*", file):
            raise ValueError(
                f"must name pictures in the folder of the settings, without a path; {shown(file)} is none"
            )
        if int(section) in read or file in read.values():
            raise ValueError(f"must name each section and each picture once; {shown(file)} is one too many")
        read[int(section)] = file
    return read


def refuse_shared(values: Mapping[str, Any], origin: str) -> None:
    """Refuse, in settings that many jobs share, what belongs to a single job.

    Raises:
        RequestError: they name the pictures of one job.
    """
    if "keyframes" in values:
        raise RequestError(f"{origin}: keyframes names the pictures of one job: put it into its NAME.toml")


class JobSettings(GenerationSettings):
    """Everything that ``NAME.toml`` may hold."""

    model: str | None = None  # None: the config's
    prompt: str | None = None
    more: Number | None = Field(None, ge=1, le=120)  # seconds to add to a finished video
    seed: Annotated[Integer | None, BeforeValidator(_read_seed), Also(', or "random"')] = Field(
        31337, ge=0, le=MAX_SEED
    )
    seeds: Integer = Field(1, ge=1, le=64)  # variations, each a job with a seed of its own
    # From a section, numbered in the order of generation, to a picture in the folder of the settings.
    keyframes: Annotated[dict[int, str], BeforeValidator(_read_keyframes)] = Field({})
    draft: bool = Field(False, strict=True)  # saves steps and cache as [draft] says; a final may follow
    crf: Integer = Field(16, ge=0, le=51)
    save_section_frames: bool = False
    keep_latents: bool = False
    embed_metadata: bool = True  # write into the mp4 how it was made
    loras: LoraSettings = Field(default_factory=list)
    gpu_memory_preservation: Number | None = Field(None, ge=0, le=128)

    def with_drawn_seed(self) -> "JobSettings":
        """Draw the seed if it is to be random; from then on it is fixed."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": secrets.randbelow(MAX_SEED + 1)})


def parse_settings(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Check one layer of settings and give the ones it sets, under our names.

    Raises:
        RequestError: a key is unknown or a value wrong; the text names key, value, range and ``origin``.
    """
    ours, said = _rename(values, origin)
    try:
        return JobSettings(**ours).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise RequestError(f"{origin}: {explain(error, JobSettings, said=said, meant=MEANT)}") from error


def _rename(values: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, str]]:
    ours: dict[str, Any] = {}
    said: dict[str, str] = {}  # our name -> the name that was used
    for key, value in values.items():
        name = OTHER_NAMES.get(key, key)
        if key in ("use_teacache", "use_random_seed"):
            try:
                value = _BOOLEAN.validate_python(value)  # from the environment it comes as text
            except ValidationError as error:
                raise RequestError(f"{origin}: {key} must be true or false, got {shown(value)}") from error
            if key == "use_random_seed":
                if value:
                    ours["seed"] = "random"  # it overrides a seed that is set too
                continue
            value = "teacache" if value else "none"
        elif name in said and name != "seed":
            raise RequestError(f"{origin}: {key} and {said[name]} set the same: leave one out")
        if name == "seed" and ours.get("seed") == "random":
            continue
        ours[name] = value
        said[name] = key
    return ours, said


def read_settings_file(path: Path, origin: str) -> dict[str, Any]:
    """Read and check a TOML file of settings.

    Raises:
        RequestError: it is not UTF-8, not TOML, or holds a mistake.
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        content = file.read(MAX_SETTINGS_BYTES + 1)
    if len(content) > MAX_SETTINGS_BYTES:
        raise RequestError(f"{origin} has more than {MAX_SETTINGS_BYTES} bytes, the most settings may have")
    text = as_text(content, origin)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, or nested without end
        raise RequestError(f"{origin} is not TOML: {str(error)[:200]}") from error
    parsed = parse_settings(values, origin)
    if origin.rpartition("/")[2].lower() == DEFAULTS_FILE:
        refuse_shared(parsed, origin)
    return parsed
