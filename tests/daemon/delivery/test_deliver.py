"""Deliveries to folders that make it hard: names they cannot hold, a thousand of one name, another end."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from framepackd import files
from framepackd.control import commands
from framepackd.delivery import deliveries, target_names
from framepackd.delivery.results import Outbox
from framepackd.files import moving
from framepackd.folders import MARKER
from framepackd.intake import take, take_back
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import Job, State
from framepackd.text import stand_ins
from tests.daemon.place import DELIVERED, Died, Place, at_every_call, dying_at

RESERVED = '<>:"\\|?*'


def ready(place: Place, path: str = "cat") -> Job:
    """Bring a job to where only its delivery is left."""
    picture = place.config.inbox / f"{path}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(picture)
    picture.with_name(f"{picture.stem}.txt").write_text("pan left")
    place.take()
    return place.generate()


def cancel(place: Place, job: Job, how: str = "discard") -> None:
    """Decide that a job whose files cannot be delivered ends cancelled."""
    assert place.store.cancel_delivery(job.id, how)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


class Picky:
    """Has outbox and failed folder refuse names as some file systems do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        self.folders, self.code, self.length, self.asked = folders, errno.EINVAL, 255, 0
        rename, touch, mkdir = files.rename_new, Path.touch, Path.mkdir

        def renaming(source: Path, target: Path) -> None:
            self.check(target)
            rename(source, target)

        def touching(path: Path, *arguments: Any, **named: Any) -> None:
            self.check(path)
            touch(path, *arguments, **named)

        def making(path: Path, *arguments: Any, **named: Any) -> None:
            self.check(path)
            mkdir(path, *arguments, **named)

        monkeypatch.setattr(files, "rename_new", renaming)
        monkeypatch.setattr(Path, "touch", touching)
        monkeypatch.setattr(Path, "mkdir", making)

    def check(self, path: Path) -> None:
        if any(path.is_relative_to(folder) for folder in self.folders):
            self.asked += 1
            if set(path.name) & set(RESERVED) or path.name.endswith((" ", ".")):
                raise OSError(self.code, os.strerror(self.code), str(path))
            if len(os.fsencode(path.name)) > self.length:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))


@pytest.fixture
def picky(place: Place, monkeypatch: pytest.MonkeyPatch) -> Picky:
    return Picky(monkeypatch, place.config.outbox, place.config.failed)


# Names


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.ENOENT, errno.EILSEQ])
@pytest.mark.parametrize("where", ["one file system", "two file systems"])
def test_a_name_that_the_outbox_cannot_hold_is_replaced_and_the_true_one_is_in_the_record(
    place: Place, picky: Picky, code: int, where: str, request: pytest.FixtureRequest
) -> None:
    """FAT and exFAT say EINVAL, by FUSE EPERM and ENOENT; some SMB servers say ENOENT."""
    if where == "two file systems":
        request.getfixturevalue("across")
    picky.code = code
    job = ready(place, "trip: rome/who?")
    place.deliver()
    assert place.outbox() == ["trip_ rome"]
    folder = place.config.outbox / "trip_ rome"
    assert names(folder) == [name.replace("cat", "who_") for name in DELIVERED]
    record = json.loads((folder / "who_.json").read_text())
    assert (record["folder"], record["name"], record["delivered_as"]) == (
        "trip: rome",
        "who?",
        "trip_ rome/who_",
    )
    job = place.store.get(job.id)
    assert (job.state, job.folder, job.name) == (State.DONE, "trip: rome", "who?")
    assert job.output == str(folder / "who_.mp4")
    (result,) = Outbox().results(place.config.outbox)
    assert result.path == "trip_ rome/who_"
    assert sorted(result.inputs) == ["trip_ rome/who_.png", "trip_ rome/who_.txt"]


def test_where_the_outbox_holds_a_name_it_is_not_replaced(place: Place) -> None:
    ready(place, "trip: rome/who?")
    place.deliver()
    folder = place.config.outbox / "trip: rome"
    assert names(folder) == [name.replace("cat", "who?") for name in DELIVERED]
    assert "delivered_as" not in json.loads((folder / "who?.json").read_text())


def test_a_name_that_is_too_long_for_the_outbox_is_cut(place: Place, picky: Picky) -> None:
    picky.length = 143  # eCryptfs
    ready(place, "ä" * 70)
    place.deliver()
    assert names(place.config.outbox) == [name.replace("cat", "ä" * 50) for name in DELIVERED]


def test_an_ordinary_name_is_not_tried_first(place: Place, picky: Picky) -> None:
    ready(place)
    place.deliver()
    assert picky.asked == len(DELIVERED)


def test_an_unwritable_outbox_is_no_reason_to_replace_a_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ready(place, "who?")

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        with pytest.raises(OSError, match="Read-only"):
            place.deliver()
    place.deliver()
    assert place.store.get(job.id).output == str(place.config.outbox / "who?.mp4")


def test_a_failed_job_whose_name_was_replaced_can_be_tried_again(place: Place, picky: Picky) -> None:
    job = ready(place, "a:b/who?")
    place.store.decide(job.id, State.FAILED, error="broken")
    place.deliver()
    folder = place.config.failed / "a_b"
    assert names(folder) == ["who_.error.txt", "who_.png", "who_.txt"]
    (result,) = commands.perform(
        {"command": "retry", "jobs": [job.id]}, commands.Queue(place.config, place.store)
    )["results"]
    assert result["done"], result
    assert names(folder) == []
    assert names(place.config.jobs_dir / job.id / work_folder.INPUTS) == ["who?.png", "who?.txt"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cat", ["cat"]),
        ("who?", ["who?", "who_"]),
        ("a. .", ["a. .", "a___"]),
        ("CON", ["CON", "CON_"]),
        ("com1.x", ["com1.x", "com1_.x"]),
        ("console", ["console"]),
        ("a\nb", ["a\nb", "a_b"]),
        ("né", ["né", "ne"]),
        ("日本?", ["日本?", "日本_", "name-9d0d6a4c"]),
        ("x" * 180, ["x" * 180, "x" * 100]),
    ],
)
def test_the_stand_in_for_a_name_is_like_it(name: str, wanted: list[str]) -> None:
    found = stand_ins(name)
    if wanted[-1].startswith("name-"):
        wanted[-1] = found[-1]
        assert found[-1].startswith("name-")
    assert found == wanted


IN_THE_KERNEL = Path("/proc/filesystems").read_text().split()


# exFAT also comes by FUSE, in packages that any machine can have; for vfat it takes the kernel's.
@pytest.fixture(params=["exfat", *(["vfat"] if "vfat" in IN_THE_KERNEL else [])])
def stick(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system of Windows in a file: by the kernel, or exFAT by FUSE."""
    kind, root, image = request.param, tmp_path / "stick", tmp_path / "image"
    by_fuse = kind == "exfat" and shutil.which("mount.exfat-fuse")
    known = kind in IN_THE_KERNEL or by_fuse
    if os.geteuid() != 0 or not shutil.which(f"mkfs.{kind}") or not known:
        pytest.skip(f"no {kind} here: as root: apt-get install exfatprogs exfat-fuse, dosfstools")
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([f"mkfs.{kind}", image], check=True, capture_output=True)
    loop = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        mount = ["mount.exfat-fuse"] if by_fuse else ["mount", "-t", kind]
        subprocess.run([*mount, loop, root], check=True, capture_output=True)
        yield root
        subprocess.run(["umount", root], check=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_windows_file_system_takes_every_stand_in(place: Place, stick: Path) -> None:
    place.config = place.config.model_copy(update={"outbox": stick})
    paths = ["trip: rome/who?", "who?", "who*", "Cat", "cat", "tail. ", "日本", "CON", "é" * 80, "a\x01b"]
    for path in paths:
        ready(place, path)
        place.deliver()
    videos = sorted(str(path.relative_to(stick)) for path in stick.rglob("*.mp4"))
    assert len(videos) == len(paths)
    assert {"trip_ rome/who_.mp4", "who_.mp4", "who__001.mp4", "Cat.mp4", "cat_001.mp4"} <= set(videos)
    assert not list(stick.rglob(".framepackd-*"))
    assert place.store.counts()["done"] == len(paths)


# Numbers


def test_more_than_a_thousand_results_may_have_one_name(place: Place) -> None:
    for number in range(1200):
        (place.config.outbox / f"cat_{number:03}.mp4").touch()
    (place.config.outbox / "cat.mp4").touch()
    job = ready(place)
    place.deliver()
    assert place.store.get(job.id).output == str(place.config.outbox / "cat_1200.mp4")
    assert (place.config.outbox / "cat_999.mp4").read_bytes() == b""


def test_a_free_name_is_found_by_listing_the_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upper and lower case may be one there, which one look shows."""
    for number in range(1100):
        (tmp_path / f"CAT_{number:03}.mp4").touch()
    (tmp_path / "CAT.mp4").touch()
    asked: list[str] = []

    def alike(path: Path) -> bool:
        asked.append(path.name)
        return path.name.upper() in {entry.name.upper() for entry in tmp_path.iterdir()}

    monkeypatch.setattr(os.path, "lexists", alike)
    assert target_names.free_stem("cat", [".mp4", ".png"], tmp_path) == "cat_1100"
    assert len(asked) < 5
    monkeypatch.undo()
    assert target_names.free_stem("cat", [".mp4"], tmp_path) == "cat", "here they are two"
    assert target_names.free_stem("cat", [".mp4"], tmp_path, after="cat_1100") == "cat_1101"


# Another end


@pytest.mark.parametrize("how", ["discard", "keep"])
def test_what_was_gathered_for_the_outbox_is_delivered_to_the_failed_folder_when_it_is_cancelled(
    place: Place, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job = ready(place)
    with monkeypatch.context() as patched:
        patched.setattr(moving, "move", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "no")))
        with pytest.raises(OSError, match="no"):
            place.deliver()
    cancel(place, job, how)
    place.deliver()
    kept = ["cat.mp4", "cat.section-0.png"] if how == "keep" else []
    assert names(place.config.failed) == sorted(["cat.cancelled.txt", "cat.png", "cat.txt", *kept])
    assert place.outbox() == []
    assert place.store.get(job.id).state == State.CANCELLED
    assert not (place.config.jobs_dir / job.id).exists()


@pytest.mark.usefixtures("across")
def test_cancelling_a_delivery_survives_dying_at_every_seventh_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two files had been delivered, and one was on its way. Each line takes 0.1 s."""
    places = iter(Place(tmp_path / str(number)) for number in range(500))

    def fresh() -> Place:
        made = next(places)
        job = ready(made)
        with monkeypatch.context() as patched:
            move = moving.move

            def halting(source: Path, target: Path, **named: Any) -> None:
                if source.name == "cat.section-0.png":
                    files.write_bytes(moving.part_beside(target, named["part"]), b"half")
                    raise Died
                move(source, target, **named)

            patched.setattr(moving, "move", halting)
            with pytest.raises(Died):
                made.deliver()
        cancel(made, job, "keep")
        return made

    place = fresh()

    def check() -> None:
        nonlocal place
        take.clear_ended(place.config, place.store)
        take.adopt_leftovers(place.config, place.store)
        place.deliver()
        assert place.outbox() == ["cat.json", "cat.png"], "no part is left there"
        wanted = ["cat.cancelled.txt", "cat.mp4", "cat.section-0.png", "cat.txt"]
        assert names(place.config.failed) == wanted
        told = (place.config.failed / "cat.cancelled.txt").read_text()
        assert f"{place.config.outbox}/cat.png\n" in told
        assert f"{place.config.outbox}/cat.txt" not in told
        take.clear_ended(place.config, place.store)
        take.adopt_leftovers(place.config, place.store)
        assert not list(place.config.jobs_dir.iterdir())
        place = fresh()

    assert at_every_call(monkeypatch, lambda: place.deliver(), check, every=7) > 30


@pytest.mark.usefixtures("across")
@pytest.mark.parametrize("reachable", [True, False])
def test_a_file_that_just_got_its_name_is_not_delivered_twice_if_that_can_be_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    job = ready(place)
    picture = place.config.jobs_dir / job.id / work_folder.OUTGOING / "cat.png"
    with dying_at(Path, "unlink", picture):
        place.deliver()
    assert (place.config.outbox / "cat.png").exists()
    if not reachable:
        place.config.outbox.rename(place.config.outbox.with_name("away"))
    cancel(place, job)
    place.deliver()
    assert ("cat.png" in names(place.config.failed)) is not reachable
    assert "cat.txt" in names(place.config.failed)


def test_a_moved_outbox_gets_the_whole_delivery(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration may have another one after a restart."""
    ready(place)
    with monkeypatch.context() as patched:
        patched.setattr(moving, "move", lambda *_, **__: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            place.deliver()
    other = place.config.outbox.with_name("other")
    other.mkdir()
    place.config = place.config.model_copy(update={"outbox": other})
    place.deliver()
    assert names(other) == DELIVERED


def test_an_outbox_that_is_not_there_is_not_made(place: Place) -> None:
    """It may be a share that is not mounted: what was put there would be hidden when it is."""
    job = ready(place)
    place.config.outbox.rmdir()
    with pytest.raises(FileNotFoundError):
        place.deliver()
    assert not place.config.outbox.exists()
    assert place.store.get(job.id).delivery is not None


def test_cancelled_while_it_is_brought_back_its_files_lie_together_under_their_old_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.config.failed / "cat.png").write_text("another's")
    job = ready(place)
    place.store.decide(job.id, State.FAILED, error="broken")
    place.deliver()
    assert names(place.config.failed) == ["cat.png", "cat_001.error.txt", "cat_001.png", "cat_001.txt"]
    place.store.retry(job.id)
    move = moving.move

    def halting(source: Path, target: Path, **named: Any) -> None:
        if source.name == "cat_001.txt":
            raise Died
        move(source, target, **named)

    with monkeypatch.context() as patched:
        patched.setattr(moving, "move", halting)
        with pytest.raises(Died):
            deliveries.settle(place.store.get(job.id), place.config, place.store, take_back.bring_back)
    assert names(place.config.failed) == ["cat.png", "cat_001.error.txt", "cat_001.txt"]
    cancel(place, job)
    place.deliver()
    assert {"cat_001.png", "cat_001.txt", "cat_001.cancelled.txt"} <= set(names(place.config.failed))


# What an older version has begun


def older(place: Place, job: Job) -> Path:
    """Gather a job as versions without a plan did."""
    work = place.config.jobs_dir / job.id
    outgoing = work / work_folder.OUTGOING
    outgoing.mkdir()
    for path in (work / work_folder.INPUTS).iterdir():
        path.rename(outgoing / path.name)
    for path in (work / work_folder.RESULT).iterdir():
        path.rename(outgoing / f"cat{path.name}")
    (outgoing / "cat.json").write_text("{}")
    (work / "stem").write_text("cat")
    return outgoing


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_delivery_that_an_older_version_began_is_finished_or_cancelled(
    place: Place, cancelled: bool
) -> None:
    job = ready(place)
    outgoing = older(place, job)
    (outgoing / "cat.png").rename(place.config.outbox / f".framepackd-{job.id}-cat.png.part")  # the only copy
    if cancelled:
        cancel(place, job)
    place.deliver()
    if cancelled:
        assert names(place.config.failed) == ["cat.cancelled.txt", "cat.png", "cat.txt"]
        assert place.outbox() == []
    else:
        assert place.outbox() == DELIVERED
        assert not names(place.config.failed)
