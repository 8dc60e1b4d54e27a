"""Checkpoints: what is loaded is what was saved, or the state before it, never something else."""

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from framepackd import files
from framepackd.jobs import aside
from framepackd.worker import checkpoint
from framepackd.worker.checkpoint import Checkpoint, Checkpoints
from tests.daemon.place import dying
from tests.daemon.worker.checkpoints import IDENTITY, contents, save_all, saves

OTHER = {**IDENTITY, "request": "other"}


def same(a: object, b: object) -> bool:
    """Compare states deeply and bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return a == b


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def listening(folder: Path, identity: Mapping[str, object] = IDENTITY) -> tuple[list[str], Checkpoints]:
    told: list[str] = []
    return told, Checkpoints(folder, identity, told.append)


def begin_anew(checkpoints: Checkpoints) -> None:
    checkpoints.save(saves()[0][0], {}, saves()[0][1])
    checkpoints.clear()


def loaded(folder: Path) -> Checkpoint:
    found = Checkpoints(folder, IDENTITY).load()
    assert found is not None
    return found


@pytest.mark.parametrize("number", range(len(saves())))
def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path: Path, number: int) -> None:
    save_all(tmp_path, number + 1)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    found = checkpoints.load()
    assert found is not None
    assert same(found.progress, saves()[number][0])
    assert found.notes == {"number": number}
    made = [made for _, made in saves()[: number + 1] if made is not None]
    assert list(checkpoints.segments("f1")) == made
    assert list(checkpoints.segments("framepack")) == made[::-1]


def test_saving_continues_after_loading_and_keeps_no_more_than_two_states(tmp_path: Path) -> None:
    save_all(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.load()
    for progress, made in saves()[3:]:
        checkpoints.save(progress, {}, made)
        checkpoints.clear()
    assert same(loaded(tmp_path).progress, saves()[-1][0])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.startswith("state")] == ["state-00000005", "state-00000006"]
    assert names[:5] == ["edge-0000", "latents-0000", "latents-0001", "segment-0000", "segment-0001"]


def test_dying_at_any_call_leaves_the_newest_state_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies leaves the file it was writing torn."""

    class DiedError(Exception):
        pass

    points = 0
    for number in range(1, len(saves())):
        for last in itertools.count(1):
            folder = tmp_path / f"{number}-{last}"
            checkpoints = save_all(folder, number)
            calls = itertools.count(1)

            def tearing(
                call: Callable[..., object], calls: Iterator[int] = calls, last: int = last
            ) -> Callable[..., object]:
                def wrapped(path: object, *arguments: object) -> object:
                    if next(calls) >= last:
                        if arguments and isinstance(arguments[0], bytes):
                            call(path, arguments[0][:-7])
                        raise DiedError
                    return call(path, *arguments)

                return wrapped

            with monkeypatch.context() as patched:
                for name in ("write_bytes", "replace", "unlink"):
                    patched.setattr(Path, name, tearing(getattr(Path, name)))
                patched.setattr(files, "sync_file", tearing(files.sync_file))
                progress, made = saves()[number]
                try:
                    checkpoints.save(progress, {}, made)
                    checkpoints.clear()
                    done = True
                except DiedError:
                    done = False
            points += 1
            found = loaded(folder).progress
            assert same(found, saves()[number][0]) or (not done and same(found, saves()[number - 1][0]))
            if done:
                assert same(found, saves()[number][0])
                break
    assert points > 30


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    save_all(tmp_path, 4)
    spoil(max(tmp_path.glob("state-*")), damage)
    assert same(loaded(tmp_path).progress, saves()[2][0])


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone"])
@pytest.mark.parametrize("name", ["segment-0000", "edge-0000"])
def test_where_a_segment_is_damaged_the_latents_are_decoded_again(
    tmp_path: Path, name: str, damage: str
) -> None:
    save_all(tmp_path, 5)
    spoil(tmp_path / name, damage)
    found = loaded(tmp_path).progress
    assert same(found.sampled, saves()[4][0].sampled)
    assert (found.decoded, found.edge) == (0, None)


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone"])
def test_where_latents_are_damaged_the_sections_before_them_are_kept(folder: Path, damage: str) -> None:
    save_all(folder)
    spoil(folder / "latents-0001", damage)
    before = contents(folder)
    told, checkpoints = listening(folder)
    found = checkpoints.load()
    assert found is not None
    assert found.rewound
    progress = found.progress
    assert (progress.decoded, progress.edge, progress.solver, progress.cache) == (0, None, None, None)
    assert same(progress.sampled, saves()[-1][0].sampled[:1])
    assert ("latents-0001 is missing" if damage == "gone" else "is not what was written") in told[0]
    checkpoints.save(progress, {})
    checkpoints.clear()
    aside = contents(folder.with_name("checkpoint.aside-1"))
    assert aside.items() <= before.items()
    assert (aside.get("latents-0001") is None) == (damage == "gone")
    assert same(loaded(folder).progress.sampled, progress.sampled)


def test_where_only_the_newest_state_names_damaged_latents_the_one_before_is_used(
    folder: Path,
) -> None:
    save_all(folder, 5)
    spoil(folder / "latents-0001", "flipped")
    found = loaded(folder)
    assert not found.rewound
    assert same(found.progress, saves()[3][0])


def test_where_all_latents_are_damaged_it_begins_again_and_keeps_what_there_was(folder: Path) -> None:
    save_all(folder)
    spoil(folder / "latents-0000", "flipped")
    before = contents(folder)
    told, checkpoints = listening(folder)
    assert checkpoints.load() is None
    assert "latents-0000 is not what was written: beginning anew" in told[0]
    begin_anew(checkpoints)
    assert contents(folder).keys() == {"state-00000001"}
    assert contents(folder.with_name("checkpoint.aside-1")) == before


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    save_all(tmp_path, 4)
    newest = max(tmp_path.glob("state-*"))
    content = bytearray(newest.read_bytes())
    for place in np.linspace(0, len(content) - 1, 40).astype(int):
        content[place] ^= 1
        newest.write_bytes(content)
        assert same(loaded(tmp_path).progress, saves()[2][0]), place
        content[place] ^= 1


def test_checkpoints_of_another_request_or_version_are_set_aside_and_not_resumed(folder: Path) -> None:
    save_all(folder, 3)
    before = contents(folder)
    told, checkpoints = listening(folder, OTHER)
    assert checkpoints.load() is None
    assert told == [
        "state-00000003 was made with another request (abc, now other): beginning anew; "
        f"the old checkpoint is kept in {folder}.aside-1"
    ]
    begin_anew(checkpoints)
    assert contents(folder).keys() == {"state-00000001"}
    assert contents(folder.with_name("checkpoint.aside-1")) == before


def test_checkpoints_of_an_older_format_are_set_aside_and_not_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", 1)
        save_all(folder, 3)
    before = contents(folder)
    told, checkpoints = listening(folder)
    assert checkpoints.load() is None
    assert "format (1, now 2)" in told[0]
    begin_anew(checkpoints)
    assert contents(folder.with_name("checkpoint.aside-1")) == before


def test_what_was_set_aside_is_restored_when_it_fits_again(folder: Path) -> None:
    """As after an update that was taken back."""
    save_all(folder, 4)
    before = contents(folder)
    checkpoints = Checkpoints(folder, OTHER)
    assert checkpoints.load() is None
    begin_anew(checkpoints)
    meanwhile = contents(folder)
    told, checkpoints = listening(folder)
    found = checkpoints.load()
    assert found is not None
    assert same(found.progress, saves()[3][0])
    assert "checkpoint.aside-1 can be used again" in told[1]
    assert contents(folder) == before
    assert [path.name for path in aside.places(folder)] == ["checkpoint.aside-2"]
    assert contents(aside.places(folder)[0]) == meanwhile


def test_to_write_what_exists_a_checkpoint_of_any_version_will_do(folder: Path) -> None:
    save_all(folder, 3)
    found = Checkpoints(folder, OTHER, to_write=True).load()
    assert found is not None
    assert same(found.progress, saves()[2][0])
    assert aside.places(folder) == []


def test_to_write_what_exists_no_latents_are_needed(folder: Path) -> None:
    save_all(folder, 3)
    spoil(folder / "latents-0000", "flipped")
    checkpoints = Checkpoints(folder, IDENTITY, to_write=True)
    found = checkpoints.load()
    assert found is not None
    assert (found.progress.decoded, found.rewound) == (1, False)
    assert same(found.progress.edge, saves()[2][0].edge)
    assert list(checkpoints.segments("f1")) == [saves()[2][1]]


@pytest.mark.parametrize("name", ["state-00000006", "latents-0001", "segment-0000"])
def test_dying_at_any_call_while_something_is_set_aside_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for identity in (IDENTITY, OTHER):
        for last in itertools.count(1):
            folder = tmp_path / f"{identity['request']}-{last}" / "checkpoint"
            save_all(folder)
            spoil(folder / name, "flipped")
            before = sorted(contents(folder).items())
            calls = itertools.count(1)
            with monkeypatch.context() as patched:
                # Loading catches errors of the disk; it must not catch this.
                for owner, call in ((Path, "rename"), (Path, "mkdir"), (files, "sync_folder")):
                    dies = dying(getattr(owner, call), calls, last, KeyboardInterrupt)
                    patched.setattr(owner, call, dies)
                try:
                    Checkpoints(folder, identity).load()
                    done = True
                except KeyboardInterrupt:
                    done = False
            found = Checkpoints(folder, identity).load()
            assert (found is None) == (identity == OTHER)
            everything = (folder, *aside.places(folder))
            assert sorted(item for place in everything for item in contents(place).items()) == before
            if done:
                break
        assert last > 2


def test_all_that_was_set_aside_of_a_job_is_found(tmp_path: Path) -> None:
    work, own = tmp_path / "job", tmp_path / "job" / "checkpoint"
    found = ["checkpoint.aside-2", "checkpoint.aside-10"]
    clips = ["clip-0001.aside-1", "clip-0002.aside-1"]
    others = ["clip-0001", "clip-0003", "clip-0003.aside-", "clip-0001.aside-x"]
    for path in (*(work / name for name in found), *(own / name for name in (*clips, *others))):
        path.mkdir(parents=True)
    (own / "clip-0001.aside-7").write_text("a file")
    assert aside.of_job(work, "checkpoint") == [work / found[0], work / found[1], *(own / n for n in clips)]
    assert aside.next_place(own) == work / "checkpoint.aside-11"


def test_a_full_disk_is_reported_and_harms_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = save_all(tmp_path, 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync_file", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(saves()[3][0], {}, None)
    assert same(loaded(tmp_path).progress, saves()[2][0])
    checkpoints.save(saves()[4][0], {}, None)  # there is room again
    checkpoints.clear()
    assert same(loaded(tmp_path).progress, saves()[4][0])


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "short" else b"")


def test_a_disk_that_cannot_be_read_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that failed once had all checkpoints removed, and the video begun again."""
    save_all(tmp_path)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    with monkeypatch.context() as patched:

        def fail(path: Path) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        patched.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.load()
    assert same(loaded(tmp_path).progress, saves()[-1][0])
