"""Takes the picture that files in the inbox wait for: their first one, or the next frame of a chain."""

import asyncio
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response

from framepackd.control import client
from framepackd.web.actions import OLD_PAGE, Actions, RefusedError
from framepackd.web.drop import put
from framepackd.web.fragments import missing_picture
from framepackd.web.make import is_file, stored
from framepackd.web.site import Shared
from framepackd.web.uploads import temporary
from framepackd.web.wishes import WrongError


class Missing:
    """Answers for the forms of files that wait for a picture."""

    def __init__(self, shared: Shared, actions: Actions) -> None:
        """Put pictures into the inbox of a configuration."""
        self._shared = shared
        self._actions = actions

    async def upload(self, request: Request) -> Response:
        """Put a picture beside the files that wait for it, under the name that they wait for."""
        async with request.form(max_files=1) as form:
            if not self._actions.is_ours(form):
                return self._actions.say(request, OLD_PAGE, 403, {"hx-refresh": "true"})
            try:
                words = await asyncio.to_thread(self._add, form)
            except (RefusedError, WrongError, OSError) as error:
                return self._actions.say(request, str(error), 409)
        return self._actions.say(request, words, 204)

    def _add(self, form: FormData) -> str:
        config, picture = self._shared.config, form.get("picture")
        folder, name = str(form.get("folder", "")), str(form.get("name", ""))
        report, _ = client.report(config)
        found = [each for each in report["waiting"] if (each["folder"], each["name"]) == (folder, name)]
        wanted = missing_picture(found[0]) if found else None
        if wanted is None:
            raise RefusedError(f"{name} does not wait for a picture any more.")
        if not is_file(picture):
            raise RefusedError("Choose a picture first.")
        own = Path(tempfile.mkdtemp(dir=temporary(self._shared.private)))
        try:
            source = stored(picture, own, "picture")
            target = str(PurePosixPath(wanted).with_suffix(source.suffix))
            put(config.inbox / folder, {target: source})
        except FileExistsError as error:
            raise RefusedError(f"There is a {wanted} by now.") from error
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return f"Added as {target}."
