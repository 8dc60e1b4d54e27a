"""The endpoint ``/process`` of FramePack's demo: scripts written for it run unchanged."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from framepack_core.errors import RequestError
from framepackd.config import Config
from framepackd.web.drop import Look, drop, look

LOOK_SECONDS = 0.5  # between two looks at a job
Yielded = tuple[dict[str, Any] | None, str]


def add_endpoint(config: Config) -> None:
    """Add the endpoint to the page that is being built; nothing of it is seen."""
    with gr.Row(visible=False):
        fields = [
            gr.File(label="input_image", type="filepath"),
            gr.File(label="end_frame", type="filepath"),
            gr.Textbox(label="prompt"),
            gr.Textbox(label="n_prompt"),
            *(gr.Number(label=label) for label in ("seed", "total_second_length", "latent_window_size")),
            *(gr.Number(label=label) for label in ("steps", "cfg", "gs", "rs", "gpu_memory_preservation")),
            gr.Checkbox(label="use_teacache", value=True),
            gr.Number(label="mp4_crf"),
            gr.Checkbox(label="use_random_seed"),
            gr.Checkbox(label="save_section_frames"),
        ]
        # A video component would hand the client a bare path; scripts ask for result[0]["video"].
        results = [gr.JSON(label="result"), gr.Textbox(label="progress")]
        gr.Button().click(
            make_process(config),
            inputs=fields,
            outputs=results,
            api_name="process",
            concurrency_limit=None,  # they wait, no more
        )


def make_process(config: Config) -> Callable[..., AsyncIterator[Yielded]]:
    """Give the function behind the endpoint; it yields progress, and at last the video."""

    async def process(
        input_image: str,
        end_frame: str | None = None,
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
        use_random_seed: bool = False,
        save_section_frames: bool = False,
    ) -> AsyncIterator[Yielded]:
        if not input_image:
            raise gr.Error("input_image is missing: give a picture")
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
        try:
            name = await asyncio.to_thread(
                drop,
                config,
                picture=Path(input_image),
                end_picture=Path(end_frame) if end_frame else None,
                prompt=prompt or "",
                settings=settings,
            )
        except (RequestError, OSError) as error:
            raise gr.Error(str(error)) from error
        async for found in _looks(config, name):
            if not found.ended:
                yield None, found.text
        assert found.job is not None
        if found.job["output"] is None:
            raise gr.Error(found.text)
        yield {"video": file_record(Path(found.job["output"])), "subtitles": None}, found.text

    return process


async def _looks(config: Config, name: str) -> AsyncIterator[Look]:
    """Look at a dropped job until it has ended; the last look is at its end."""
    while True:
        found = await asyncio.to_thread(look, config, name)
        yield found
        if found.ended:
            return
        await asyncio.sleep(LOOK_SECONDS)


def _whole(value: Any) -> Any:
    """Have whole numbers be integers: a form knows of floats only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def file_record(path: Path) -> dict[str, Any]:
    """Describe a file so that gradio's client downloads it and puts its own path in its place."""
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
