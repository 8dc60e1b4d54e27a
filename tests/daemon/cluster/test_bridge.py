"""A remote card does a job as a worker of this machine would."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from framepack_core.media.pictures import count_frames
from framepack_core.request import Lora
from framepackd.jobs.folder import CONTINUED
from framepackd.worker import messages
from framepackd.worker.messages import Finished, Work, Written
from framepackd.worker.source_video import START, TAIL, Continued
from tests.core.models.loras import make_lora, stored
from tests.daemon.cluster.jobs import done_on, front_work, own_of
from tests.daemon.worker.jobs import chain_in, made, run, work_in


def with_end_frame(folder: Path) -> Work:
    work = work_in(folder)
    Image.new("RGB", (48, 32), "red").save(folder / "end.png")
    return replace(work, request=work.request.model_copy(update={"end_image": folder / "end.png"}))


def with_lora(folder: Path) -> Work:
    work = work_in(folder)
    file = folder.parent.parent / "loras" / "oil.safetensors"
    file.parent.mkdir(exist_ok=True)
    make_lora(file, "kohya-hunyuan", stored(work.spec))
    return replace(work, request=work.request.model_copy(update={"loras": (Lora(file=file, weight=0.7),)}))


def with_strip_and_no_stills(folder: Path) -> Work:
    return replace(work_in(folder), filmstrip=True, save_section_frames=False, keep_latents=False)


def extending(folder: Path) -> Work:
    """A job that extends a video, which the node decodes again."""
    work = work_in(folder, transformer="framepack-f1")
    before = work_in(folder.parent.parent / "before", transformer="framepack-f1")
    run(before)
    video = folder / "clip.mp4"
    shutil.copy(before.result / ".mp4", video)
    continued = Continued(
        video=str(folder / "inputs" / video.name),
        folder=str(folder / CONTINUED),
        frames=count_frames(video),
        latents=None,
        window=work.request.latent_window_size,
        size=work.size,
        crf=work.crf,
    )
    request = work.request.model_copy(
        update={"image": folder / CONTINUED / START, "continue_from": folder / CONTINUED / TAIL}
    )
    return replace(work, request=request, continued=continued, frames=continued.stays + work.frames)


@pytest.mark.parametrize(
    "make", [work_in, with_end_frame, with_lora, with_strip_and_no_stills, chain_in, extending]
)
def test_a_job_on_a_remote_card_is_the_same_as_on_this_machine(
    tmp_path: Path, make: Callable[[Path], Work]
) -> None:
    alone = front_work(tmp_path / "alone", make)
    _, said = run(alone)
    work = front_work(tmp_path / "front", make)
    told = done_on(own_of(tmp_path / "node"), work)
    assert isinstance(told[-1], Written), told[-1]
    assert isinstance(told[-1].reply, Finished)
    assert [type(message) for message in told] == [
        *(type(message) for message in said),
        messages.Sampled,
        messages.Written,
    ]
    assert made(work) == made(alone)
    assert (work.preview.exists(), work.preview.with_suffix(".png").exists()) == (True, True)
