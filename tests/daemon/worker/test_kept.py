"""What a worker tells of its files: any part of it, from the first message on, can be resumed from."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from framepackd import files
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.kept import PART_BYTES, Mirrored
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Clear,
    Finished,
    Kept,
    Message,
    Moved,
    Resumed,
    SetAside,
    StepDone,
    Work,
)
from tests.daemon.worker.jobs import ENGINES, STEPS, Ears, chain_in, made, run, work_in


class Told(Ears):
    """Hears what a worker says, and what it tells of its files, in one order."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Message] = []
        self.theirs.send = self.all.append  # type: ignore[method-assign, assignment] # a pipe would be full

    def run(self, work: Work) -> Message:
        mirrored = Mirrored(self.all.append)
        mirrored.begin(work)
        files.observe(mirrored)
        try:
            return answer(work, ENGINES, self.theirs)
        finally:
            files.observe(None)


def apply(messages: list[Message], folder: Path) -> None:
    """Write what the messages say, as plainly as can be."""
    for message in messages:
        match message:
            case Kept():
                path = folder / message.name
                path.parent.mkdir(parents=True, exist_ok=True)
                before = path.read_bytes() if message.offset else b""
                assert len(before) == message.offset
                path.write_bytes(before + message.content)
            case Clear():
                (folder / message.name).unlink(missing_ok=True)
            case Moved():
                (folder / message.target).parent.mkdir(parents=True, exist_ok=True)
                (folder / message.source).rename(folder / message.target)


def steps_done(messages: list[Message], work: Work) -> int:
    """Count the steps of all clips that the messages report."""
    clips = len(work.clips)
    done = [0] * clips
    for message in messages:
        if isinstance(message, Resumed):
            done = list(message.clips or [message.steps])
        if isinstance(message, StepDone):
            clip, before = divmod(message.section - 1, work.sections // clips)
            done[clip] = before * STEPS + message.step
    return sum(done)


def cuts(told: list[Message]) -> Iterator[int]:
    """Give the places after which a resume may find something else than before."""
    yield 0
    for number, message in enumerate(told, 1):
        if isinstance(message, StepDone) or getattr(message, "name", "").startswith("checkpoint/"):
            yield number


def check_prefixes(told: list[Message], work: Work, tmp_path: Path, *, every: int = 1) -> None:
    """Resume from what prefixes leave; the inputs are there anyway."""
    whole = made(work)
    for number in islice(cuts(told), 0, None, every):
        there = tmp_path / f"after-{number}"
        there.mkdir()
        for file in work.result.parent.glob("*.png"):
            if file.name != "preview.png":
                shutil.copy(file, there)
        apply(told[:number], there)
        again = moved_to(work, there)
        reply, heard = run(again)
        assert isinstance(reply, Finished), reply
        aside = [message.text for message in heard if isinstance(message, SetAside)]
        assert not aside, f"after {number} messages a checkpoint is not whole: {aside}"
        (resumed,) = (message.steps for message in heard if isinstance(message, Resumed))
        assert resumed >= steps_done(told[:number], work) - 1, f"after {number} messages"
        assert made(again)[".mp4"] == whole[".mp4"], f"after {number} messages"
        shutil.rmtree(there)


def moved_to(work: Work, folder: Path) -> Work:
    before = work.result.parent

    def there(request: Any) -> Any:
        pictures = {"image": folder / request.image.name}
        if request.end_image is not None:
            pictures["end_image"] = folder / request.end_image.name
        return request.model_copy(update=pictures)

    own = {
        name: folder / getattr(work, name).relative_to(before) for name in ("result", "checkpoint", "preview")
    }
    return replace(
        work, request=there(work.request), following=tuple(map(there, work.following)), mirrored=False, **own
    )


@pytest.mark.parametrize(("make", "every"), [(work_in, 1), (chain_in, 5)])
def test_after_any_message_a_job_resumes_at_most_one_step_before_the_last_that_was_reported(
    tmp_path: Path, make: Any, every: int
) -> None:
    work, ears = make(tmp_path / "job"), Told()
    assert isinstance(ears.run(work), Finished)
    check_prefixes(ears.all, work, tmp_path, every=every)


def test_what_was_told_to_the_end_is_what_is_there(tmp_path: Path) -> None:
    work, ears = work_in(tmp_path / "job"), Told()
    ears.run(replace(work, filmstrip=True))
    apply(ears.all, tmp_path / "mirror")
    kept = {"result", "checkpoint"}
    there, here = (
        {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.relative_to(root).parts[0] in kept
        }
        for root in (tmp_path / "mirror", tmp_path / "job")
    )
    assert there == here
    assert "result/.framepackd-strip.jpg" in there
    assert (tmp_path / "mirror" / "preview.mp4").exists()


def test_a_state_that_is_told_before_the_latents_it_names_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is what the property above is about: with this fault in it, it must fail."""
    save = Checkpoints.save

    def in_the_wrong_order(checkpoints: Checkpoints, *arguments: Any) -> None:
        late: list[tuple[Path, bool]] = []
        told, tell = files.tell_written, late.append
        monkeypatch.setattr(files, "tell_written", lambda path, *, durable=True: tell((path, durable)))
        save(checkpoints, *arguments)
        monkeypatch.setattr(files, "tell_written", told)
        for path, durable in reversed(late):
            told(path, durable=durable)

    work, ears = work_in(tmp_path / "job"), Told()
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", in_the_wrong_order)
        assert isinstance(ears.run(work), Finished)
    with pytest.raises(AssertionError, match="is not whole"):
        check_prefixes(ears.all, work, tmp_path)


def test_a_large_file_is_told_in_parts_and_an_empty_one_in_one(tmp_path: Path) -> None:
    work, told = work_in(tmp_path / "job"), list[Any]()
    mirrored = Mirrored(told.append)
    mirrored.begin(work)
    for name, size in (("large", 2 * PART_BYTES + 1), ("empty", 0)):
        path = work.result.parent / name
        path.write_bytes(bytes(size))
        mirrored.written(path, durable=True)
    assert [(part.name, part.offset, len(part.content)) for part in told] == [
        ("large", 0, PART_BYTES),
        ("large", PART_BYTES, PART_BYTES),
        ("large", 2 * PART_BYTES, 1),
        ("empty", 0, 0),
    ]


def test_files_of_jobs_that_are_not_mirrored_or_have_ended_are_not_told(tmp_path: Path) -> None:
    told = list[Message]()
    mirrored = Mirrored(told.append)
    works = [replace(work_in(tmp_path / name), job_id=name) for name in ("first", "second", "third")]
    for work in works:
        mirrored.begin(work)
    for work in (*works, work_in(tmp_path / "other")):
        mirrored.removed(work.preview)
    assert told == [Clear("second", "preview.mp4"), Clear("third", "preview.mp4")]


def test_a_checkpoint_that_is_set_aside_is_told_as_moved(tmp_path: Path) -> None:
    work, ears = work_in(tmp_path / "job"), Told()
    run(work)
    ears.run(replace(work, fingerprint="another"))
    assert Moved("job", "checkpoint", "checkpoint.aside-1") in ears.all
