"""Does what the page's buttons say: each is a form that carries a token, and works without scripts."""

import asyncio
import hmac
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from framepack_core.errors import RequestError
from framepackd.control import client
from framepackd.problems import CommandError
from framepackd.settings.config import Config
from framepackd.text import rest_of_name
from framepackd.web.again import make_again
from framepackd.web.drop import drop, put
from framepackd.web.events import Watch
from framepackd.web.fragments import choice
from framepackd.web.mending import write_setting, wrong_setting
from framepackd.web.site import Shared
from framepackd.web.trash import move_to_trash, put_away

OLD_PAGE = "This page is from before a restart. It is loaded again: then try once more."
# The bundled picture, and what the demo model does best with it: as framepackd demo.
LAKE, PROMPT = "demo/lake.png", "Night falls over the lake."


class RefusedError(Exception):
    """What is asked cannot be done; the text says why."""


class Actions:
    """Answers for the buttons."""

    def __init__(self, shared: Shared, watch: Watch) -> None:
        """Change what the commands of a configuration change."""
        self._shared = shared
        self._watch = watch
        self._done: dict[str, Callable[[FormData], str]] = {
            "sentence": self._sentence,
            "choose": self._choose,
            "lake": self._lake,
            "again": self._again,
            "with": self._with,
            "trash": self._trash,
        }

    async def answer(self, request: Request) -> Response:
        """Do what a form asks for, and say what was done."""
        async with request.form(max_files=0) as form:
            if not self.is_ours(form):
                return self.say(request, OLD_PAGE, 403, {"hx-refresh": "true"})
            what = request.path_params["what"]
            try:
                words = await asyncio.to_thread(self._do, what, form)
            except RefusedError as refused:
                return self.say(request, str(refused), 409)
            self._watch.hurry()
            return self.say(request, words, 204, back=_text(form, "back"))

    def is_ours(self, form: FormData) -> bool:
        """Say whether a form came with a page of this process: nobody else knows the token."""
        return hmac.compare_digest(_text(form, "token").encode(), self._shared.token.encode())

    def say(
        self,
        request: Request,
        words: str,
        status: int,
        headers: dict[str, str] | None = None,
        *,
        back: str = "",
    ) -> Response:
        """Answer with words: a page with scripts shows them, one without is loaded again and shows them."""
        headers = headers or {}
        if request.headers.get("hx-request") == "true":
            told = json.dumps({"say": {"words": words, "bad": status >= 400}})
            return Response(status_code=status, headers={**headers, "hx-trigger": told})
        place = back if back.startswith("/") and not back.startswith(("//", "/\\")) else "/"
        return RedirectResponse(f"{place}?said={self._shared.keep(words)}", 303)

    def _do(self, what: str, form: FormData) -> str:
        try:
            if what in self._done:
                return self._done[what](form)
            return _changed(self._shared.config, _command(what, form))
        except (CommandError, OSError, RequestError) as error:
            raise RefusedError(str(error)) from error

    def _sentence(self, form: FormData) -> str:
        """Write the text that a picture in the inbox waits for."""
        text = _text(form, "text").strip()
        if not text:
            raise RefusedError("Say what moves, in a sentence.")
        folder, name = _text(form, "folder"), _text(form, "name")
        report, _ = client.report(self._shared.config)
        wanted = (folder, name, "no_prompt")
        if wanted not in ((each["folder"], each["name"], each["reason"]) for each in report["waiting"]):
            raise RefusedError(f"{name} does not wait for its sentence any more.")
        try:
            put(self._shared.config.inbox / folder, {f"{name}.txt": f"{text}\n".encode()})
        except FileExistsError as error:
            raise RefusedError(f"There is a {name}.txt by now.") from error
        return f"Written as {name}.txt. It is in the queue in {self._shared.config.settle_seconds:g} s."

    def _choose(self, form: FormData) -> str:
        """Take one of the pictures that have the same name; the others go to the trash."""
        folder, name, wanted = (_text(form, key) for key in ("folder", "name", "file"))
        report, _ = client.report(self._shared.config)
        found = [each for each in report["waiting"] if (each["folder"], each["name"]) == (folder, name)]
        pictures = choice(found[0]) if found else []
        if wanted not in pictures:
            raise RefusedError(f"{name} does not wait for a choice any more.")
        others = [self._shared.config.inbox / folder / file for file in pictures if file != wanted]
        target = put_away(self._shared.config, others, folder, name)
        return f"{wanted} it is. The other is in {target}; nothing is deleted."

    def _lake(self, form: FormData) -> str:
        """Drop the picture that comes with framepackd."""
        with resources.as_file(resources.files("framepackd").joinpath(LAKE)) as picture:
            drop(self._shared.config, picture=picture, prompt=PROMPT, settings={})
        return f"The lake is in the inbox: in the queue in {self._shared.config.settle_seconds:g} s."

    def _again(self, form: FormData) -> str:
        """Make a result again, with something changed."""
        found = self._shared.gallery.find(_text(form, "job"))
        if found is None:
            raise RefusedError("This result is not in the outbox any more.")
        return make_again(self._shared.config, found, _text(form, "how"), _text(form, "seconds"))

    def _with(self, form: FormData) -> str:
        """Correct the setting with which a job has failed, and run it again."""
        config = self._shared.config
        record, _ = client.show(config, _text(form, "job"))
        wrong = wrong_setting(record["name"], record["error"]) if record else None
        if record is None or wrong is None or wrong.key != _text(form, "key") or not record["reason_file"]:
            raise RefusedError("This job does not wait for that setting any more.")
        reason = Path(record["reason_file"])
        stem = reason.name.removesuffix(".error.txt")
        rest = rest_of_name(record["inputs"]["settings"]["file"], record["name"])
        write_setting(reason.with_name(f"{stem}{rest}"), wrong.key, _text(form, "value").strip())
        return _changed(config, {"command": "retry", "jobs": [record["id"]]})

    def _trash(self, form: FormData) -> str:
        found = self._shared.gallery.find(_text(form, "job"))
        if found is None:
            raise RefusedError("This result is not in the outbox any more.")
        folder = move_to_trash(self._shared.config, found)
        self._shared.gallery.forget()
        return f"Moved to {folder}. Nothing is deleted."


def _command(what: str, form: FormData) -> dict[str, Any]:
    if what in ("pause", "resume"):
        return {"command": what}
    jobs = [str(job) for job in form.getlist("job") if job]
    if what not in ("cancel", "top", "move", "retry", "final", "dismiss") or not jobs:
        raise RefusedError("There is nothing that this button could do.")
    more: dict[str, Any] = {}
    if what == "cancel":
        more["keep"] = bool(form.get("keep"))
    if what == "move":
        more["before"] = _text(form, "before") or None
    return {"command": what, "jobs": jobs, **more}


def _changed(config: Config, request: dict[str, Any]) -> str:
    """Have the daemon do it, or do it where none runs; gives what was done in words."""
    results = [result for part in client.change(config, request) for result in part]
    refused = [result["message"] for result in results if not result["done"]]
    if refused:
        raise RefusedError(_plain(" ".join(refused)))
    if len(results) > 1 and request["command"] == "retry":
        return f"{len(results)} videos are in the queue again."
    return _words(request) or _plain(results[0]["message"])


def _words(request: dict[str, Any]) -> str | None:
    """Say it as the page does, which shows the job itself."""
    words = {
        "pause": "Paused. The card is free in a moment; what is done so far is kept.",
        "resume": "Going on.",
        "top": "Next in line.",
        "move": "Moved.",
        "retry": "Back in the queue.",
        "final": "It is in the queue, with all its steps. The draft stays.",
        "dismiss": "Put away. Its files stay where they are.",
    }
    return words.get(request["command"])


def _plain(message: str) -> str:
    """Leave out the id of a job, which means nothing on the page.

    >>> _plain("job 20260101-120000-abcdef (web/cat) is cancelled")
    'web/cat is cancelled'
    """
    if message.startswith("job ") and " (" in message:
        path, _, rest = message.partition(" (")[2].partition(")")
        return path + rest
    return message


def _text(form: FormData, key: str) -> str:
    value = form.get(key)
    return value if isinstance(value, str) else ""
