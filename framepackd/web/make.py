"""Shows the form of a new video, says what it costs, and drops what it says into the inbox."""

import asyncio
import json
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from framepack_core.errors import RequestError
from framepackd.control import client
from framepackd.inbox import inspect
from framepackd.inbox.naming import is_picture, picture_types
from framepackd.settings import loras
from framepackd.web import again, cost
from framepackd.web.actions import OLD_PAGE, Actions
from framepackd.web.drop import Dropped, drop_many
from framepackd.web.fragments import prepared
from framepackd.web.gallery import Shown
from framepackd.web.rendering import label, render
from framepackd.web.site import Shared
from framepackd.web.uploads import temporary
from framepackd.web.wishes import (
    SIZES,
    WrongError,
    defaults_of,
    jobs_from,
    length_of,
    settings_from,
    told,
)

MOST_PICTURES, MOST_FIELDS = 500, 3000
REMEMBERED = 500  # forms that were sent
LONGEST_SECONDS = 120
EXAMPLES = (
    "The dancer whirls across the stage, arms wide, her skirt opening like a flower.",
    "The old tram climbs the hill and sways, sparks at its wire, rain on the road.",
    "The dough rises, swells over the rim and folds back.",
)
KINDS = {"framepack": "Holds on to its picture.", "f1": "Moves more; has no end frame and no chain."}
Common = Callable[[Request, str], Coroutine[Any, Any, dict[str, Any]]]


class Make:
    """Answers for the page on which videos are asked for."""

    def __init__(self, shared: Shared, actions: Actions, common: Common) -> None:
        """Drop into the inbox of a configuration."""
        self._shared = shared
        self._actions = actions
        self._common = common
        self._sent: OrderedDict[str, str] = OrderedDict()  # what was said to each form that was sent
        self._one = asyncio.Lock()

    async def page(self, request: Request) -> Response:
        """Show the form, as the defaults have it or as a result was made."""
        like = request.query_params.get("like")
        found = self._shared.gallery.find(like) if like else None
        values = await asyncio.to_thread(self._values, found)
        return await self._form(request, values, found)

    async def estimate(self, request: Request) -> Response:
        """Say what the form would cost."""
        async with request.form(max_files=0, max_fields=MOST_FIELDS) as form:
            if not self._actions.is_ours(form):
                return self._actions.say(request, OLD_PAGE, 403, {"hx-refresh": "true"})
            plan = self._plan(form)
        report, _ = await asyncio.to_thread(client.report, self._shared.config)
        found = cost.reckon(prepared(report), plan)
        return HTMLResponse(render("_cost.html", cost=found), headers={"cache-control": "no-store"})

    async def upload(self, request: Request) -> Response:
        """Make videos out of the form, once for each time that it is shown."""
        async with request.form(max_files=MOST_PICTURES, max_fields=MOST_FIELDS) as form:
            if not self._actions.is_ours(form):
                return self._actions.say(request, OLD_PAGE, 403, {"hx-refresh": "true"})
            number = str(form.get("number", ""))
            async with self._one:  # the second click of two waits, and hears what the first was told
                words = self._sent.get(number)
                if words is None:
                    try:
                        words = await self._drop(form)
                    except WrongError as wrong:
                        return await self._refuse(request, form, wrong)
                    self._remember(number, words)
        if request.headers.get("hx-request") == "true":
            told_of = {"say": {"words": words}, "made": {"number": secrets.token_urlsafe(9)}}
            return Response(status_code=204, headers={"hx-trigger": json.dumps(told_of)})
        return RedirectResponse(f"/?said={self._shared.keep(words)}", 303)

    def _remember(self, number: str, words: str) -> None:
        if number:
            self._sent[number] = words
        while len(self._sent) > REMEMBERED:
            self._sent.popitem(last=False)

    def _values(self, like: Shown | None) -> dict[str, Any]:
        """Give the settings that the form begins with."""
        values = defaults_of(self._shared.config)
        if like is None:
            return values | {"prompt": ""}
        try:
            record = again.read_record(self._shared.config, like)
        except OSError:
            return values
        return values | again.settings_of(record) | {"prompt": like.result.record.prompt}

    async def _form(
        self,
        request: Request,
        values: dict[str, Any],
        like: Shown | None,
        wrong: WrongError | None = None,
    ) -> Response:
        config = self._shared.config
        length = length_of(values)
        shown = await self._common(request, "make")
        shown |= {
            "values": values,
            "like": like,
            "wrong": wrong,
            "number": secrets.token_urlsafe(9),
            "models": [(name, label(name), kind) for name, kind in sorted(config.model_kinds().items())],
            "kinds": KINDS,
            "draft_steps": config.draft.steps,
            "sizes": SIZES,
            "loras": await asyncio.to_thread(loras.names, config.lora_dir),
            "sections": length.sections(float(values["seconds"])),
            "most": int(LONGEST_SECONDS / length.section),
            "section_seconds": length.section,
            "true": length.true(length.sections(float(values["seconds"]))),
            "examples": EXAMPLES,
            "types": picture_types(),
        }
        answer = render("make.html", **shown)
        return HTMLResponse(answer, 422 if wrong else 200, headers={"cache-control": "no-store"})

    async def _refuse(self, request: Request, form: FormData, wrong: WrongError) -> Response:
        """Say what is wrong at its field."""
        if request.headers.get("hx-request") == "true":
            told_of = {"wrong": {"field": wrong.field, "words": wrong.words}}
            return Response(status_code=422, headers={"hx-trigger": json.dumps(told_of)})
        like = self._shared.gallery.find(str(form.get("like", "")))
        typed = {key: value for key, value in form.items() if isinstance(value, str) and value}
        values = self._values(like)
        return await self._form(request, values | {"prompt": typed.get("prompt", "")}, like, wrong)

    def _plan(self, form: FormData) -> cost.Plan:
        values = defaults_of(self._shared.config)
        width, height = _number(form, "width", 0), _number(form, "height", 0)
        steps = _number(form, "steps", int(values["steps"]))
        if form.get("draft"):
            steps = min(steps, self._shared.config.draft.steps)
        return cost.Plan(
            model=str(form.get("model") or values["model"]),
            sections=_number(form, "sections", 4) * max(_number(form, "clips", 1), 1),
            steps=steps,
            pixels=float(width * height) or None,
            count=max(_number(form, "count", 1), 1) * max(_number(form, "seeds", 1), 1),
        )

    async def _drop(self, form: FormData) -> str:
        """Check everything, then put all of it into the inbox, or nothing."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=temporary(self._shared.private)))
        try:
            return await asyncio.to_thread(self._drop_from, form, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _drop_from(self, form: FormData, folder: Path) -> str:
        config = self._shared.config
        pictures = [stored(each, folder, "pictures") for each in form.getlist("pictures") if is_file(each)]
        ends = [stored(each, folder, "end") for each in form.getlist("end") if is_file(each)]
        like = self._shared.gallery.find(str(form.get("like", "")))
        kept: dict[str, Path] = {}
        base = defaults_of(config)
        try:
            if like is not None:
                record = again.read_record(config, like)
                base |= again.settings_of(record)
                if not pictures:
                    kept = again.pictures_of(config, like, record)
            if not pictures and not kept:
                raise WrongError("pictures", "Give a picture first: it is what the video begins with.")
            settings = settings_from(form, config, base)
            if kept and not any(map(form.get, ("width", "height", "size"))):  # else a new picture has its own
                settings |= {key: base[key] for key in ("width", "height")}
            jobs = jobs_from(form, pictures or [Path()], ends[0] if ends else None, settings)
            if kept:
                ended = {"_end": ends[0]} if ends else {}
                jobs = [Dropped({**kept, **ended}, jobs[0].prompt, settings)]
            self._verify(jobs)
            drop_many(config, jobs)
        except RequestError as error:
            raise told(error) from error
        except OSError as error:
            raise WrongError("form", str(error)) from error
        many = len(jobs) * int(settings.get("seeds", 1))
        what = "It is" if many == 1 else f"{many} videos are"
        return f"{what} in the inbox, and in the queue in {config.settle_seconds:g} s."

    def _verify(self, jobs: list[Dropped]) -> None:
        """Look whether the model can arrive at a picture, if one is given.

        Raises:
            WrongError: it cannot.
        """
        config = self._shared.config
        aims = any(rest for job in jobs for rest in job.pictures)
        model = str(jobs[0].settings.get("model", defaults_of(config)["model"]))
        try:
            config.spec(model).verify(end_image=aims, others=config.specs())
        except RequestError as error:
            raise WrongError("model", str(error)) from error


def is_file(value: object) -> bool:
    """Say whether a field of a form holds a file."""
    return isinstance(value, UploadFile) and bool(value.filename)


def stored(upload: Any, folder: Path, field: str) -> Path:
    """Keep an uploaded picture as a file, and look whether it is one.

    Raises:
        WrongError: it cannot be read.
    """
    name = str(upload.filename).replace("\\", "/").rpartition("/")[2]
    if not is_picture(name):
        raise WrongError(field, f"{name[:80]} is no picture that can be read: use {picture_types()}.")
    path = folder / f"{field}-{len(list(folder.iterdir()))}{Path(name).suffix.lower()}"
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    try:
        inspect.picture_size(path, tell=lambda _: None)
    except RequestError as error:
        raise WrongError(field, str(error).replace(path.name, name[:80])) from error
    return path


def _number(form: FormData, key: str, otherwise: int) -> int:
    text = str(form.get(key, ""))
    return int(text) if text.isdecimal() and len(text) < 9 else otherwise
