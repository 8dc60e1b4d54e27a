"""The video as it grows: what exists can be played, and no frame is encoded more than twice."""

import errno
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framepack_core.media import segments
from framepack_core.media.pictures import Picture, count_frames
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Failed,
    Finished,
    Resumed,
    SectionDecoded,
    StepDone,
    Stopped,
    Work,
)
from framepackd.worker.video import Video
from tests.conftest import KINDS
from tests.daemon.worker.jobs import ENGINES, LeavingEars, made, run, work_in

SECTIONS = 4  # of window 3: the first one backward settles no frame, the last one brings more than the others
LASTING = {"seconds": 1.6}


@pytest.fixture(params=sorted(KINDS))
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Work:
    work = work_in(tmp_path, transformer=request.param, **LASTING)
    assert work.sections == SECTIONS
    return work


def leave_in_section(work: Work, section: int) -> None:
    ears = LeavingEars(lambda said: isinstance(said, StepDone) and (said.section, said.step) == (section, 1))
    assert answer(work, ENGINES, ears.theirs) == Stopped()


def test_after_every_section_what_exists_can_be_played(work: Work) -> None:
    for section in range(1, SECTIONS):
        leave_in_section(work, section + 1)
        frames = 12 * section + (1 if work.spec.kind == "f1" else -3)  # backward the picture comes last
        assert count_frames(work.preview) == frames
    assert isinstance(run(work)[0], Finished)
    assert count_frames(work.result / ".mp4") == work.frames


def test_a_video_that_begins_again_has_no_preview_of_another(work: Work) -> None:
    work.preview.write_bytes(b"of another version")
    ears = LeavingEars(lambda said: isinstance(said, StepDone))
    assert answer(work, ENGINES, ears.theirs) == Stopped()
    assert not work.preview.exists()


def test_no_frame_is_encoded_more_than_twice_and_each_once_for_good(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = {segments.EXACT: 0, segments.QUICK: 0}
    encode = segments.encode

    def counting(frames: Iterable[Picture], *, options: str = segments.EXACT, **named: Any) -> bytes:
        frames = list(frames)
        encoded[options] += len(frames)
        return encode(frames, options=options, **named)

    monkeypatch.setattr(segments, "encode", counting)
    assert isinstance(run(work)[0], Finished)
    assert encoded[segments.EXACT] == work.frames
    assert encoded[segments.QUICK] == (SECTIONS - 1) * (4 * 3 - 3), "once each, at the edge of a section"
    assert sum(encoded.values()) <= 2 * work.frames


def answer_encoding_while_sampling(
    work: Work, monkeypatch: pytest.MonkeyPatch, at_step: Callable[[], None]
) -> object:
    """Do a job whose segments are encoded only when a step of the next section is computed."""
    sampling = threading.Event()
    encode = segments.encode
    told: list[type] = []

    def waiting(*arguments: Any, **named: Any) -> bytes:
        assert sampling.wait(20), "nothing is sampled meanwhile"
        return encode(*arguments, **named)

    def sampled(*_: object) -> None:
        if SectionDecoded in told:
            sampling.set()
            at_step()

    def note(said: object) -> bool:
        told.append(type(said))
        return False

    monkeypatch.setattr(segments, "encode", waiting)
    hook = ENGINES.get(work, 0).models.transformer.proj_out.register_forward_hook(sampled)
    try:
        return answer(work, ENGINES, LeavingEars(note).theirs)
    finally:
        hook.remove()


def test_a_section_is_encoded_while_the_next_one_is_sampled(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(answer_encoding_while_sampling(work, monkeypatch, lambda: None), Finished)


def test_a_section_is_whole_on_disk_even_if_the_one_after_it_fails(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever goes on with the job would find it still being written."""

    def fail() -> None:
        raise RuntimeError("planted")

    assert isinstance(answer_encoding_while_sampling(work, monkeypatch, fail), Failed)
    assert work.preview.exists(), "what is written last"
    assert run(work)[1][0] == Resumed(2)


def test_no_step_counts_as_done_before_the_section_before_it_is_durable(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    encode = segments.encode

    def noting(*arguments: Any, options: str = segments.EXACT, **named: Any) -> bytes:
        if options == segments.EXACT:
            told.append("encoded")
        return encode(*arguments, options=options, **named)

    monkeypatch.setattr(segments, "encode", noting)

    def note(said: object) -> bool:
        told.append(type(said))
        return False

    ears = LeavingEars(note)
    assert isinstance(answer(work, ENGINES, ears.theirs), Finished)
    for number, what in enumerate(told):
        if what is SectionDecoded:
            later = told[number:].index(StepDone) if StepDone in told[number:] else len(told)
            assert told[: number + later].count("encoded") == told[: number + 1].count(SectionDecoded)


def test_a_damaged_segment_is_made_again_from_its_latents(tmp_path: Path, work: Work) -> None:
    whole = work_in(tmp_path / "whole", transformer=work.spec.name, **LASTING)
    assert isinstance(run(whole)[0], Finished)
    leave_in_section(work, 3)
    segment = work.checkpoint / "segment-0001"
    segment.write_bytes(segment.read_bytes()[:-1])
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    assert (3, 1) not in [(m.section, m.step) for m in messages if isinstance(m, StepDone)]
    assert made(work) == made(whole)


def test_a_video_that_an_older_version_began_ends_in_its_colours(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of both kinds cannot be joined, and the bits are those that it would have had."""
    whole = work_in(tmp_path / "whole", transformer=work.spec.name, **LASTING)
    with monkeypatch.context() as older:
        older.setattr(Video, "colours", "bt601")
        assert isinstance(run(whole)[0], Finished)
        leave_in_section(work, 3)
    assert segments.colours_of(work.preview.read_bytes()) == "bt601"
    leave_in_section(work, 4)
    assert isinstance(run(work)[0], Finished)
    assert made(work) == made(whole)
    assert segments.colours_of((work.result / ".mp4").read_bytes()) == "bt601"


def test_what_exists_of_a_video_that_an_older_version_began_is_kept_in_its_colours(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(Video, "colours", "bt601")
        leave_in_section(work, 3)
    frames = count_frames(work.preview)
    assert isinstance(run(replace(work, keep_only=True))[0], Finished)
    assert count_frames(work.result / ".mp4") == frames
    assert segments.colours_of((work.result / ".mp4").read_bytes()) == "bt601"


def test_a_job_does_without_a_preview_that_cannot_be_written_and_says_so_once(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    join = segments.join

    def full(path: Path, pieces: Iterable[bytes], *tags: Any) -> int:
        if path.parent == work.preview.parent:
            path.write_bytes(b"what there was room for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return join(path, pieces, *tags)

    monkeypatch.setattr(segments, "join", full)
    assert isinstance(run(work)[0], Finished)
    assert caplog.text.count("there is no preview") == 1
    left = {path.name for path in work.preview.parent.iterdir() if "preview" in path.name}
    assert left <= {"preview.png"}, "that of the sampling is another one"
