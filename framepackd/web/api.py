"""The endpoints ``/process`` and ``/end_process`` of FramePack's demo: scripts for it run unchanged."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import gradio as gr
from gradio.data_classes import FileData
from gradio.routes import App, ORJSONResponse
from pydantic import ValidationError
from starlette.types import ASGIApp

from framepack_core.errors import RequestError
from framepack_core.mistakes import shown
from framepackd.control import client
from framepackd.problems import CommandError
from framepackd.settings.config import Config
from framepackd.web.drop import FOLDER, Look, Setting, drop, look

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # from one look at a job to the next
ALONE_SECONDS = 60.0  # without a daemon; one that is updated is back by then
CACHE_SECONDS = (300, 1800)  # how often gradio looks through its copies, and how old they get
Yielded = tuple[dict[str, Any] | None, str]
Calls = dict[str | None, set[str]]  # NAMEs that are waited for, by the session of the client


class Upload(FileData):
    """A file as the client sends it."""

    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> Self:
        """Check it as gradio does, whose own text would not reach the script."""
        try:
            return super().model_validate(obj, **how)
        except ValidationError as error:
            form = 'handle_file("cat.png")'
            raise _error(f"a picture must be a file, as {form} gives it, got {shown(obj)}") from error


def guarded(guard: Callable[[ASGIApp, App], ASGIApp]) -> App:
    """Give the app that gradio is to serve the API with: nothing of it is reached but through ``guard``."""

    class Guarded(App):
        def build_middleware_stack(self) -> ASGIApp:
            return guard(super().build_middleware_stack(), self)  # gradio's own would answer other origins

    return Guarded(default_response_class=ORJSONResponse)


def build(config: Config) -> gr.Blocks:
    """Build what scripts call; nobody sees it, for the page is not gradio's."""
    gr.set_static_paths([config.outbox])  # served as they are: copied, they would use up the uploads' quota
    api: gr.Blocks
    with gr.Blocks(title="framepackd", delete_cache=CACHE_SECONDS, analytics_enabled=False) as api:
        _add_endpoints(config)
    api.queue(default_concurrency_limit=None)
    return api


def _add_endpoints(config: Config) -> None:
    calls: Calls = defaultdict(set)
    with gr.Row(visible=False):
        # In the order of the demo's function, for scripts that name no parameter; our own come after them.
        fields = [
            image := gr.File(label="input_image", type="filepath"),
            gr.Textbox(label="prompt"),
            gr.Textbox(label="n_prompt"),
            *(gr.Number(label=label) for label in ("seed", "total_second_length", "latent_window_size")),
            *(gr.Number(label=label) for label in ("steps", "cfg", "gs", "rs", "gpu_memory_preservation")),
            gr.Checkbox(label="use_teacache", value=True),
            gr.Number(label="mp4_crf"),
            end := gr.File(label="end_frame", type="filepath"),
            gr.Checkbox(label="use_random_seed"),
            gr.Checkbox(label="save_section_frames"),
        ]
        image.data_model = end.data_model = Upload
        # A video component would hand the client a bare path; scripts ask for result[0]["video"].
        results = [gr.JSON(label="result"), gr.Textbox(label="progress")]
        gr.Button().click(
            make_process(config, calls),
            inputs=fields,
            outputs=results,
            api_name="process",
            concurrency_limit=None,  # calls only wait
        )
        gr.Button().click(
            make_end_process(config, calls),
            outputs=[gr.Textbox(label="told")],
            api_name="end_process",
            concurrency_limit=None,
        )


def make_process(config: Config, calls: Calls) -> Callable[..., AsyncIterator[Yielded]]:
    """Give the function of the endpoint; it yields progress, and at last the video."""

    async def process(
        input_image: str,
        prompt: str = "",
        n_prompt: str | None = None,
        seed: float | None = None,
        total_second_length: float | None = None,
        latent_window_size: float | None = None,
        steps: float | None = None,
        cfg: float | None = None,
        gs: float | None = None,
        rs: float | None = None,
        gpu_memory_preservation: float | None = None,
        use_teacache: bool = True,
        mp4_crf: float | None = None,
        end_frame: str | None = None,
        use_random_seed: bool = False,
        save_section_frames: bool = False,
        request: gr.Request | None = None,
    ) -> AsyncIterator[Yielded]:
        if not input_image:
            raise _error('input_image is missing: give a picture, as handle_file("cat.png")')
        asked = {
            "n_prompt": n_prompt or None,
            "seed": seed,
            "total_second_length": total_second_length,
            "latent_window_size": latent_window_size,
            "steps": steps,
            "cfg": cfg,
            "gs": gs,
            "rs": rs,
            "gpu_memory_preservation": gpu_memory_preservation,
            "use_teacache": use_teacache,
            "mp4_crf": mp4_crf,
            "use_random_seed": use_random_seed or None,
            "save_section_frames": save_section_frames or None,
        }
        settings = {key: _whole(value) for key, value in asked.items() if value is not None}
        name = await _dropped(config, input_image, end_frame, prompt or "", settings)
        mine = calls[request.session_hash if request else None]
        mine.add(name)
        try:
            async for found in _watched(config, name):
                if not found.ended:
                    yield None, found.text
        finally:
            mine.discard(name)
        assert found.job is not None
        if found.job["output"] is None:
            raise _error(found.text)
        yield {"video": file_record(Path(found.job["output"])), "subtitles": None}, found.text

    return process


async def _dropped(
    config: Config, picture: str, end_picture: str | None, prompt: str, settings: dict[str, Setting]
) -> str:
    """Drop a job's files and give its NAME; mistakes in them become the endpoint's error."""
    try:
        return await asyncio.to_thread(
            drop,
            config,
            picture=Path(picture),
            end_picture=Path(end_picture) if end_picture else None,
            prompt=prompt,
            settings=settings,
        )
    except (RequestError, OSError) as error:
        raise _error(str(error)) from error
    except Exception as error:
        log.exception("a call of /process")
        raise _own_error(error) from error


def make_end_process(config: Config, calls: Calls) -> Callable[..., Any]:
    """Give the function that cancels the jobs that the same client waits for, and no others."""

    async def end_process(request: gr.Request) -> str:
        names = sorted(calls.get(request.session_hash, ()))
        if not names:
            return (
                "nothing to end: this client waits for no video (each Client has its own; other jobs are "
                "ended on the page, or by framepackd cancel)"
            )
        return "\n".join([await _end(config, name) for name in names])

    return end_process


async def _end(config: Config, name: str) -> str:
    """Cancel a dropped job as soon as it is in the queue; what exists of its video is kept."""
    async for found in _watched(config, name):
        if found.job is not None:
            break
    asked = {"command": "cancel", "jobs": [found.job["id"]], "keep": True} if found.job else {}
    try:
        results = await asyncio.to_thread(client.perform, config, asked)
    except (CommandError, OSError) as error:
        raise _error(str(error)) from error
    return str(results[0]["message"])


def _error(text: str) -> gr.Error:
    """Make an error whose text reaches the script; it is no fault of the page, so it is not logged."""
    return gr.Error(text, print_exception=False)


def _own_error(error: Exception) -> gr.Error:
    return _error(f"an error of framepackd's own ({type(error).__name__}: {error}): please report it")


async def _watched(config: Config, name: str) -> AsyncIterator[Look]:
    """Look at a dropped job until it has ended.

    Raises:
        gr.Error: no daemon has run for long; the job stays where it is.
    """
    alone_since = None
    async for found in _looks(config, name):
        yield found
        if not found.alone:
            alone_since = None
        elif alone_since is None:
            alone_since = time.monotonic()
        elif time.monotonic() - alone_since >= ALONE_SECONDS:
            raise _error(
                f"{found.text}; it is {FOLDER}/{name}, and its video will be in {config.outbox / FOLDER}. "
                "Do not ask for it again"
            )


async def _looks(config: Config, name: str) -> AsyncIterator[Look]:
    """Look at a dropped job until it has ended; the last look is at its end."""
    while True:
        found = await asyncio.to_thread(look, config, name)
        yield found
        if found.ended:
            return
        await asyncio.sleep(LOOK_SECONDS)


def _whole(value: Any) -> Any:
    """Turn whole floats into integers: a form sends floats only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def file_record(path: Path) -> dict[str, Any]:
    """Describe a file so that gradio's client downloads it and puts its own path in its place."""
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
