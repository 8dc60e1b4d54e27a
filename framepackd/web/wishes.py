"""Reads the form of a new video: what it wishes for becomes settings, what is wrong is told at its field."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData

from framepack_core.errors import RequestError
from framepack_core.sections import section_count
from framepackd.settings.config import Config
from framepackd.settings.job_settings import JobSettings, parse_settings
from framepackd.web.drop import Dropped

FPS = 30
NUMBERS = {"steps": int, "guidance_scale": float, "true_cfg_scale": float, "crf": int, "seeds": int}
SIZES = (("480", "480, quicker"), ("320", "320, much quicker"), ("768", "768, slower"))
LINE = re.compile(r"\s*([0-9.]+)\s*(?:-|–|to)\s*([0-9.]+)\s*s?[:,]?\s+(\S.*)")
OF_A_SETTING = re.compile(r"the settings: (\w+)[\w.\[\]]* (.*)", re.DOTALL)
EMPTY = "Say what moves, in a sentence. Then I can start."


class WrongError(Exception):
    """Something in the form cannot be; says at which field, and what."""

    def __init__(self, field: str, words: str) -> None:
        """Take the field and the words."""
        super().__init__(words)
        self.field = field
        self.words = words


@dataclass(frozen=True)
class Length:
    """How a length in sections becomes seconds."""

    window: int

    @property
    def section(self) -> float:
        """The seconds that one section adds."""
        return 4 * self.window / FPS

    def asked(self, sections: int) -> float:
        """Give the seconds to ask for."""
        return max(round(sections * self.section, 3), 1.0)

    def sections(self, seconds: float) -> int:
        """Give the sections that a length becomes."""
        return section_count(seconds, self.window)

    def true(self, sections: int) -> float:
        """Give the seconds that the video will have."""
        return (sections * 4 * self.window + 1) / FPS


def defaults_of(config: Config) -> dict[str, Any]:
    """Give the settings that a job has which sets none."""
    plain = JobSettings().model_dump()
    return plain | {"model": config.model} | dict(config.defaults)


def length_of(values: Mapping[str, Any]) -> Length:
    """Say how long sections are with such settings."""
    return Length(int(values.get("latent_window_size") or 9))


def settings_from(form: FormData, config: Config, base: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that a form says and that are not the defaults anyway.

    ``base``: those that the form began with; what it does not show stays as there.

    Raises:
        WrongError: one of them cannot be.
    """
    said: dict[str, Any] = {**base}
    model = _text(form, "model")
    if model:
        if model not in config.model_names():
            raise WrongError("model", f"There is no model {model}.")
        said["model"] = model
    if _text(form, "sections"):
        said["seconds"] = length_of(said).asked(max(int(_number(form, "sections", int)), 1))
    said |= _size(form)
    said["seed"] = _seed(_text(form, "seed"))
    for key, kind in NUMBERS.items():
        if _text(form, key):
            said[key] = _number(form, key, kind)
    if "steps" in form:  # else a script's form, which shows no box for it
        said["cache"] = _text(form, "cache") or "none"
    if "draft-form" in form:
        said["draft"] = bool(_text(form, "draft"))
    if "negative_prompt" in form:
        said["negative_prompt"] = _text(form, "negative_prompt")
    if "prompts" in form:
        said["prompts"] = _timed(_text(form, "prompts"))
    if "lora-form" in form:
        said["loras"] = _loras(form)
    usual = defaults_of(config)
    changed = {key: value for key, value in said.items() if value != usual.get(key) and value is not None}
    changed.pop("prompt", None)
    try:
        parse_settings(changed, "the settings")
    except RequestError as error:
        raise told(error) from error
    return changed


def told(error: RequestError) -> WrongError:
    """Say at which field a mistake in the settings is to be seen."""
    found = OF_A_SETTING.match(str(error))
    return WrongError(found[1], f"{found[1]} {found[2]}") if found else WrongError("form", str(error))


def _text(form: FormData, key: str) -> str:
    value = form.get(key)
    return value.strip() if isinstance(value, str) else ""


def _number(form: FormData, key: str, kind: type[int] | type[float]) -> float | int:
    text = _text(form, key)
    try:
        return kind(text)
    except ValueError as error:
        whole = "a whole number" if kind is int else "a number"
        raise WrongError(key, f"This must be {whole}, and {text[:40]!r} is none.") from error


def _seed(text: str) -> int | str:
    if text.casefold() in ("", "random"):
        return "random"
    if not text.isdecimal():
        raise WrongError("seed", f"A seed is a whole number, or the word random; {text[:40]!r} is neither.")
    return int(text)


def _size(form: FormData) -> dict[str, Any]:
    width, height = _text(form, "width"), _text(form, "height")
    if width and height:
        return {"width": int(_number(form, "width", int)), "height": int(_number(form, "height", int))}
    if width or height:
        raise WrongError("width" if height else "height", "Give both, width and height, or neither.")
    size = _text(form, "size")
    if not size:
        return {"width": None, "height": None, "resolution": None}
    return {"width": None, "height": None, "resolution": int(_number(form, "size", int))}


def _timed(text: str) -> list[dict[str, Any]]:
    prompts = []
    for line in filter(str.strip, text.splitlines()):
        found = LINE.fullmatch(line)
        try:
            start, end = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
        except ValueError:
            found = None
        if found is None:
            raise WrongError(
                "prompts", f"Write each line as “0-2.4 The cat jumps.”; {line.strip()[:60]!r} is not."
            )
        prompts.append({"from": start, "to": end, "text": found[3].strip()})
    return prompts


def _loras(form: FormData) -> list[dict[str, Any]]:
    chosen = []
    for file, weight in zip(form.getlist("lora"), form.getlist("weight"), strict=False):
        if not file:
            continue
        try:
            chosen.append({"file": str(file), "weight": float(str(weight) or 1)})
        except ValueError as error:
            raise WrongError("loras", f"A weight is a number, and {str(weight)[:20]!r} is none.") from error
    return chosen


def jobs_from(
    form: FormData, pictures: list[Any], end: Any | None, settings: dict[str, Any]
) -> list[Dropped]:
    """Give the jobs that a form makes of its pictures: one each, or one chain of all.

    Raises:
        WrongError: a sentence is missing, or a chain cannot be.
    """
    prompt = _text(form, "prompt")
    if _text(form, "as") == "chain" and len(pictures) > 1:
        if not prompt:
            raise WrongError("prompt", EMPTY)
        chain = {f"_frame_{number}": picture for number, picture in enumerate(pictures)}
        return [Dropped(chain, prompt, settings)]
    own = [str(text).strip() for text in form.getlist("own")]
    jobs = []
    for number, picture in enumerate(pictures):
        text = (own[number] if number < len(own) else "") or prompt
        if not text:
            raise WrongError("prompt", EMPTY)
        ends = {"_end": end} if end is not None and len(pictures) == 1 else {}
        jobs.append(Dropped({"": picture, **ends}, text, settings))
    return jobs
