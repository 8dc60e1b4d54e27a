"""Builds the page: the form, the queue with its buttons, and what came out."""

import html
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.routes import App, ORJSONResponse
from starlette.types import ASGIApp

from framepack_core.errors import RequestError
from framepackd.control import client
from framepackd.jobs.folder import PREVIEW
from framepackd.jobs.report import running_in
from framepackd.problems import CommandError
from framepackd.settings.config import Config
from framepackd.web import words
from framepackd.web.api import add_endpoints
from framepackd.web.drop import Setting, drop

REFRESH_SECONDS = 2.0
LATENT_PREVIEW = "preview.png"  # in a job's folder
CACHE_SECONDS = (300, 1800)  # how often gradio looks through its copies, and how old they get
QUICK_PROMPTS = [
    "The girl dances gracefully, with clear movements, full of charm.",
    "The man dances powerfully, with clear movements, full of energy.",
    "The man dances energetically, leaping mid-air with fluid arm swings and quick footwork.",
]
HEAD = """
<h1>framepackd</h1>
<p class="lead">A picture and a sentence become a video. What you start here goes into the inbox:
close this page whenever you like.</p>
"""
STYLE = """
.gradio-container {max-width: 1280px !important; margin: auto}
#now {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 16px}
#now .name {font-weight: 600; font-size: 1.1em}
#now .bar {height: 10px; border-radius: 5px; background: var(--border-color-primary); margin: 8px 0}
#now .bar div {height: 100%; border-radius: 5px; background: var(--primary-500)}
#now .small, .lead {color: var(--body-text-color-subdued)}
footer {display: none !important}
"""
ACTIVE, ENDED = ("running", "queued"), ("done", "failed", "cancelled", "skipped")


def theme() -> gr.themes.Base:
    """Give the look, with fonts that are on every machine: nothing is fetched from elsewhere."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def guarded(guard: Callable[[ASGIApp], ASGIApp]) -> App:
    """Give the app with which gradio serves the page; every request to it goes through ``guard``."""

    class Guarded(App):
        def build_middleware_stack(self) -> ASGIApp:
            return guard(super().build_middleware_stack())  # gradio's own middleware answers other origins

    return Guarded(default_response_class=ORJSONResponse)


def build(config: Config, copies: Path) -> gr.Blocks:
    """Build the page and the endpoints; ``copies`` is a folder for files that would change while shown."""
    gr.set_static_paths([config.outbox, copies])  # copied, they would use up the uploads' quota
    shown = _Shown(config, copies)
    page: gr.Blocks
    with gr.Blocks(title="framepackd", delete_cache=CACHE_SECONDS, analytics_enabled=False) as page:
        gr.HTML(HEAD)
        with gr.Row():
            with gr.Column():
                _form(config)
            with gr.Column():
                now = gr.HTML(elem_id="now")
                preview = gr.Image(label="This section, as it is by now", interactive=False, visible=False)
                growing = gr.Video(
                    label="The video so far", interactive=False, visible=False, autoplay=True, loop=True
                )
        queue, waiting, results = _lists(config)
        seen = gr.State({})
        outputs = [seen, now, preview, growing, *queue, waiting, *results]
        timer = gr.Timer(REFRESH_SECONDS)
        for moment in (timer.tick, page.load):
            moment(
                shown.refresh,
                [seen],
                outputs,
                show_progress="hidden",
                api_visibility="private",
                concurrency_limit=None,
            )
        add_endpoints(config)
    page.queue(default_concurrency_limit=None)
    return page


def _form(config: Config) -> None:
    picture = gr.Image(
        type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"], height=300
    )
    _leave_as_uploaded(picture)
    with gr.Accordion("End frame", open=False):
        end = gr.Image(
            type="filepath",
            image_mode=None,
            label="The video ends with it",
            sources=["upload", "clipboard"],
            height=200,
        )
        _leave_as_uploaded(end)
    prompt = gr.Textbox(label="Prompt", lines=2, placeholder="Who moves, and how")
    quick = gr.Dataset(
        label="Quick prompts",
        samples=[[text] for text in QUICK_PROMPTS],
        components=[prompt],
        samples_per_page=10,
    )
    quick.click(lambda sample: sample[0], [quick], [prompt], show_progress="hidden", api_visibility="private")
    settings: dict[str, gr.components.Component] = {}  # by their names in the API
    with gr.Row():
        settings["seconds"] = gr.Slider(1, 120, 5, step=0.1, label="Length (seconds)")
        settings["seed"] = gr.Number(31337, label="Seed", precision=0)
        settings["use_random_seed"] = gr.Checkbox(label="Random seed", value=False)
    settings["use_teacache"] = gr.Checkbox(
        label="TeaCache: faster, but often makes hands and fingers slightly worse", value=True
    )
    with gr.Accordion("More settings", open=False):
        settings |= _more_settings()
    start = gr.Button("Generate", variant="primary")
    told = gr.Markdown()

    def submit(picture: str | None, end: str | None, prompt: str, *values: Any) -> str:
        if not picture:
            raise gr.Error("Give a picture first.")
        try:
            name = drop(
                config,
                picture=Path(picture),
                end_picture=Path(end) if end else None,
                prompt=prompt,
                settings=given(settings, values),
            )
        except (RequestError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        return f"In the inbox as `{name}`; in the queue in {config.settle_seconds:g} seconds."

    start.click(submit, [picture, end, prompt, *settings.values()], [told], api_visibility="private")


def _leave_as_uploaded(picture: gr.Image) -> None:
    """Pass a picture on as its file: gradio's Pillow refuses some that the daemon reads."""
    picture.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign] # as said


def given(keys: Iterable[str], values: Iterable[Any]) -> dict[str, Setting]:
    """Give the settings that a form sets: not those that are empty or not ticked."""
    return {
        key: value
        for key, value in zip(keys, values, strict=True)
        if not (value is None or value is False or value == "") or key == "use_teacache"
    }


def _more_settings() -> dict[str, gr.components.Component]:
    """Lay out the settings that are seldom changed."""
    return {
        "steps": gr.Slider(1, 100, 25, step=1, label="Steps: changing this is not recommended"),
        "gs": gr.Slider(1, 32, 10, step=0.1, label="Distilled guidance scale"),
        "n_prompt": gr.Textbox(label="Negative prompt: with a CFG scale above 1"),
        "cfg": gr.Slider(1, 32, 1, step=0.1, label="CFG scale: above 1 each step takes twice as long"),
        "rs": gr.Slider(0, 1, 0, step=0.01, label="CFG rescale"),
        "mp4_crf": gr.Slider(
            *(0, 51, 16),
            step=1,
            label="MP4 compression: lower is better; 16 if the video comes out black",
            info="0 is lossless, which phones, Firefox and QuickTime do not play: 1 looks the same and is "
            "played everywhere",
        ),
        "gpu_memory_preservation": gr.Slider(0, 128, 6, step=0.1, label="GPU memory to leave to others (GB)"),
        "save_section_frames": gr.Checkbox(label="Also a still of each section"),
    }


def _lists(config: Config) -> tuple[list[Any], Any, list[Any]]:
    gr.Markdown("## Queue")
    queue = gr.Dataframe(
        headers=["name", "state", "progress", "ends"],
        datatype="str",
        interactive=False,
        show_label=False,
        wrap=True,
    )
    with gr.Row():
        choice = gr.Dropdown(label="Job", choices=[], scale=3)
        cancel, front, anew = gr.Button("Cancel"), gr.Button("To the front"), gr.Button("Begin it anew")
        pause, resume = gr.Button("Pause the queue"), gr.Button("Go on")
    waiting = gr.HTML()
    gr.Markdown("## Results")
    ended = gr.Dataframe(
        headers=["name", "state", "finished", "length", "note"],
        column_widths=["34%", "9%", "16%", "10%", "31%"],
        datatype="str",
        interactive=False,
        show_label=False,
        wrap=True,
    )
    with gr.Row():
        result = gr.Dropdown(label="Result", choices=[], scale=3)
        retry = gr.Button("Make it again")
    with gr.Row():
        video = gr.Video(label="Result", interactive=False, visible=False)
        details = gr.JSON(label="How it was made", visible=False, max_height=400)
    for button, command, of in (
        (cancel, "cancel", [choice]),
        (front, "top", [choice]),
        (pause, "pause", []),
        (resume, "resume", []),
        (retry, "retry", [result]),
        (anew, "retry --anew", [choice]),
    ):
        button.click(_asking(config, command), of, None, api_visibility="private")
    result.change(
        _showing(config), [result], [video, details], show_progress="hidden", api_visibility="private"
    )
    return [queue, choice], waiting, [ended, result]


def _asking(config: Config, command: str) -> Callable[..., None]:
    """Give the function of a button: it sends a command to the daemon, or performs it if none runs."""

    def ask(job: str | None = None) -> None:
        if command in ("cancel", "top", "retry", "retry --anew") and not job:
            raise gr.Error("Choose a job first.")
        name, _, anew = command.partition(" --")
        request: dict[str, Any] = {"command": name, **({"jobs": [job]} if job else {}), "anew": bool(anew)}
        try:
            results = client.perform(config, request)
        except (CommandError, OSError) as error:
            raise gr.Error(html.escape(str(error))) from error
        for result in results:
            text = html.escape(result["message"])
            if not result["done"]:
                raise gr.Error(text)
            gr.Info(text)

    return ask


def _showing(config: Config) -> Callable[[str | None], tuple[Any, Any]]:
    def show(job: str | None) -> tuple[Any, Any]:
        if not job:
            return gr.update(visible=False), gr.update(visible=False)
        try:
            record, _ = client.show(config, job)
        except (CommandError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        output = Path(record["output"]) if record and record["output"] else None
        there = output is not None and output.exists()
        return gr.update(value=str(output) if there else None, visible=there), gr.update(
            value=record, visible=True
        )

    return show


class _Shown:
    """The contents of the page; only what has changed is sent, so that nothing flickers."""

    def __init__(self, config: Config, copies: Path) -> None:
        self._config = config
        self._copies = copies

    def refresh(self, seen: dict[str, Any]) -> tuple[Any, ...]:
        report, _ = client.report(self._config)
        active = [job for job in report["jobs"] if job["state"] in ACTIVE]
        ended = [job for job in report["jobs"] if job["state"] in ENDED]
        running = running_in(report)
        folder = self._config.jobs_dir / running["id"] if running else None
        contents = {
            "now": words.now(report, running),
            "preview": self._copy(folder and folder / LATENT_PREVIEW),
            "growing": self._copy(folder and folder / PREVIEW),
            "queue": [
                [words.path(job), job["state"], words.progress(job), words.ends(job)] for job in active
            ],
            "choice": [(words.path(job), job["id"]) for job in active],
            "waiting": words.waiting(report["waiting"]),
            "ended": [
                [
                    words.path(job),
                    job["state"],
                    words.local(job["finished_at"]),
                    words.length(job),
                    words.note(job),
                ]
                for job in ended
            ],
            "result": [
                (f"{words.path(job)} ({words.local(job['finished_at'])})", job["id"]) for job in ended
            ],
        }
        updates = {
            key: _update(key, value) if seen.get(key) != value else gr.skip()
            for key, value in contents.items()
        }
        return contents, *updates.values()

    def _copy(self, path: Path | None) -> str | None:
        """Copy a file that may be replaced at any time, under a name of its own for each version."""
        if path is None:
            return None
        try:
            status = path.stat()
            copy = self._copies / f"{path.parent.name}-{status.st_mtime_ns}{path.suffix}"
            if not copy.exists():
                old = sorted(self._copies.glob(f"*{path.suffix}"), key=lambda copy: copy.stat().st_mtime_ns)
                for copied in old[:-1]:  # the last one may still be played
                    copied.unlink(missing_ok=True)
                shutil.copyfile(path, copy)
        except OSError:  # just now replaced, or removed with its job
            return None
        return str(copy)


def _update(key: str, value: Any) -> Any:
    if key in ("preview", "growing"):
        return gr.update(value=value, visible=value is not None)
    if key == "choice":
        return gr.update(choices=value)
    if key == "result":  # the newest is shown
        return gr.update(choices=value, value=value[0][1] if value else None)
    if key in ("queue", "ended"):
        return gr.update(value=value, visible=bool(value))
    return gr.update(value=value)
