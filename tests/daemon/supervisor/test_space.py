"""Room for a job is looked for before it starts, on the file systems that it will really need."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framepack_core.media.segments import encode, join
from framepackd.jobs.job import Job, State, utc_now
from framepackd.settings.config import Config
from framepackd.supervisor.readiness import needed, shortage

MIB = 1 << 20


def job(*, width: int = 64, height: int = 64, sections: int = 1, **settings: Any) -> Job:
    window = settings.setdefault("latent_window_size", 9)
    return Job(
        id="job-1",
        name="cat",
        folder="pets",
        state=State.QUEUED,
        created_at=utc_now(),
        width=width,
        height=height,
        sections=sections,
        frames=4 * window * sections + 1,
        settings={"crf": 16, "save_section_frames": False} | settings,
    )


def config(state: Path, **folders: Path) -> Config:
    config = Config(state_dir=state, **{"outbox": state / "outbox", "failed": state / "failed"} | folders)
    (config.jobs_dir / "job-1/inputs").mkdir(parents=True)
    return config


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_parts_of_a_five_second_video_of_640x640() -> None:
    parts = needed(job(width=640, height=640, sections=4, save_section_frames=True, keep_latents=True))
    frame, latent = 640 * 640 * 3, 16 * 80 * 80 * 4
    assert parts["segments"] == parts["preview"] == parts["video"] < 145 * frame / 2
    assert parts["sampler state"] == 3 * 6 * 9 * latent
    assert parts["latents"] == parts["kept latents"] == (4 * 9 + 1) * latent
    assert parts["section edges"] == 2 * 33 * frame * 4
    assert parts["stills"] == 4 * frame
    assert sum(parts.values()) < 700 * MIB


@pytest.mark.parametrize("crf", [0, 1, 16, 30, 51])
def test_no_video_is_larger_than_its_estimate(tmp_path: Path, crf: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (37, 64, 64, 3), dtype=np.uint8)
    join(tmp_path / "noise.mp4", [encode(frames, size=(64, 64), crf=crf)])
    container = 4096  # its headers, which count only in a video as small as this
    assert (tmp_path / "noise.mp4").stat().st_size < needed(job(crf=crf))["video"] + container


def test_a_job_that_fits_has_no_shortage(tmp_path: Path) -> None:
    assert shortage(job(), config(tmp_path / "state"), reserve=0) is None


def test_what_running_jobs_still_need_is_kept_free(disk: Path) -> None:
    """Two that fit one at a time would fill the disk together."""
    there = config(disk)
    running = job()
    running.id = "job-2"
    (there.jobs_dir / "job-2/inputs").mkdir(parents=True)
    assert shortage(job(), there, reserve=0) is None
    told = shortage(job(), there, running=[running], reserve=0)
    assert told is not None
    assert " needs 4.3 MiB there and 4.3 MiB are kept free" in told
    (there.jobs_dir / "job-2/segments").write_bytes(bytes(3 * MIB))
    assert shortage(job(), there, running=[running], reserve=0) is not None
    smaller = job()
    smaller.width = 32
    assert shortage(smaller, there, running=[running], reserve=0) is None, "what it has written is done"


def test_a_shortage_names_folder_room_need_and_remedy(tmp_path: Path) -> None:
    told = shortage(job(), config(tmp_path / "state"), reserve=1 << 60)
    assert told is not None
    assert told.startswith(f"{tmp_path / 'state'} has ")
    assert " free, pets/cat needs 4.3 MiB there and 1073741824.0 GiB are kept free: free " in told
    assert told.endswith(", or set state_dir to a larger disk")


def test_a_state_folder_that_is_not_there_yet_is_looked_for_above(tmp_path: Path) -> None:
    state = tmp_path / "not/yet"
    assert shortage(job(), Config(state_dir=state, outbox=state, failed=state), reserve=0) is None


def test_a_disk_too_small_for_the_job_is_reported_and_a_larger_one_is_not(disk: Path) -> None:
    assert shortage(job(), config(disk), reserve=0) is None
    told = shortage(job(sections=12), config(disk / "other"), reserve=0)
    assert told is not None
    assert told.startswith(f"{disk}/other has 8.0 MiB free, pets/cat needs ")


def test_what_a_job_has_made_already_is_not_asked_for_again(disk: Path) -> None:
    here = config(disk)
    made = here.jobs_dir / "job-1/frames"
    made.write_bytes(bytes(4 * MIB))
    assert shortage(job(sections=4), here, reserve=0) is None  # 4 MiB are free, and 4 of 5.8 are there
    made.rename(disk / "somebody-elses")
    assert "has 4.0 MiB free, pets/cat needs 5.8" in (shortage(job(sections=4), here, reserve=0) or "")


def test_inputs_in_the_work_folder_are_no_work_done(disk: Path) -> None:
    here = config(disk)
    (here.jobs_dir / "job-1/inputs/cat.png").write_bytes(bytes(4 * MIB))
    assert shortage(job(), here, reserve=0) is not None


def test_the_reserve_is_kept_free(disk: Path) -> None:
    assert shortage(job(), config(disk), reserve=3 * MIB) is None
    assert "5.0 MiB are kept free" in (shortage(job(), config(disk / "b"), reserve=5 * MIB) or "")


def test_an_outbox_on_another_file_system_needs_room_for_the_video_too(disk: Path, tmp_path: Path) -> None:
    here = config(tmp_path / "state", outbox=disk / "out")
    assert shortage(job(), here, reserve=0) is None
    (disk / "full").write_bytes(bytes(8 * MIB - 4096))
    told = shortage(job(), here, reserve=0)
    assert told is not None
    assert told.startswith(f"{disk} has 0.1 MiB free, pets/cat needs 0.")
    assert told.endswith("or set outbox to a larger disk")


def test_inputs_that_would_not_fit_into_the_failed_folder_are_reported(disk: Path, tmp_path: Path) -> None:
    here = config(tmp_path / "state", failed=disk)
    (here.jobs_dir / "job-1/inputs/cat.png").write_bytes(bytes(9 * MIB))
    assert (shortage(job(), here, reserve=0) or "").endswith("or set failed to a larger disk")
