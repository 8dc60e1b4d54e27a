"""Copying to another file system: stopped, cut off, resumed; the rights of a file that is moved."""

import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from framepackd import files
from framepackd.files import moving
from tests.daemon.place import Died, dying_at, without_renameat2

BLOCK, DURABLE = 10, 40  # bytes
CONTENT = bytes(range(256)) + b"end"
pytestmark = pytest.mark.usefixtures("across")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "COPIED_AT_ONCE", BLOCK)
    monkeypatch.setattr(moving, "DURABLE_EVERY", DURABLE)


class Move:
    """A file that is to be moved."""

    def __init__(self, root: Path) -> None:
        self.source, self.target = root / "work/outgoing/a", root / "outbox/a"
        self.note = root / "work/moving.json"
        for path in (self.source, self.target):
            path.parent.mkdir(parents=True)
        self.source.write_bytes(CONTENT)

    @property
    def part(self) -> Path:
        return moving.part_beside(self.target, "x")

    def go(self, *, blocks: int | None = None) -> moving.Progress:
        """Move it, or so many blocks of it."""
        asked = iter(range(blocks)) if blocks is not None else None

        def stop() -> bool:
            return asked is not None and next(asked, None) is None

        progress = moving.Progress(stop=stop)
        moving.move(self.source, self.target, part="x", note=self.note, progress=progress)
        return progress

    def interrupted(self, *, blocks: int = 9) -> None:
        with pytest.raises(moving.StoppedError):
            self.go(blocks=blocks)


@pytest.fixture
def move(tmp_path: Path) -> Move:
    return Move(tmp_path)


def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the bytes that are copied from now on, by block."""
    sizes: list[int] = []
    write = os.write

    def counting(descriptor: int, block: bytes) -> int:
        sizes.append(len(block))
        return write(descriptor, block)

    monkeypatch.setattr(os, "write", counting)
    return sizes


def test_a_stopped_copy_resumes_from_the_durable_bytes_of_its_part(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    move.interrupted(blocks=9)
    assert move.source.read_bytes() == CONTENT
    assert not move.target.exists()
    assert move.part.read_bytes() == CONTENT[:90]
    sizes = written(monkeypatch)
    assert move.go().done == len(CONTENT)
    assert sum(sizes) == len(CONTENT) - 2 * DURABLE
    assert move.target.read_bytes() == CONTENT
    assert [path for path in move.target.parent.parent.rglob("*") if path.is_file()] == [move.target]


def test_a_copy_that_is_stopped_again_and_again_ends(move: Move) -> None:
    stops = 0
    while move.source.exists():
        try:
            move.go(blocks=5)
        except moving.StoppedError:
            stops += 1
        assert stops < 10
    assert stops > 4
    assert move.target.read_bytes() == CONTENT


def zeros_at_the_end(move: Move) -> None:
    """After a power cut a file may have its length and hold nothing."""
    move.part.write_bytes(CONTENT[: 2 * DURABLE] + bytes(100))


def zeros_where_it_was_noted(move: Move) -> None:
    """A disk may say that it has written what it has not."""
    move.part.write_bytes(bytes(90))


def shorter(move: Move) -> None:
    move.part.write_bytes(CONTENT[:35])


def gone(move: Move) -> None:
    move.part.unlink()


def torn_note(move: Move) -> None:
    move.note.write_text(move.note.read_text()[:20])


def note_of_nothing(move: Move) -> None:
    move.note.write_text("null")


def no_note(move: Move) -> None:
    move.note.unlink()
    move.part.write_bytes(bytes(90))


def another_source(move: Move) -> None:
    move.source.write_bytes(CONTENT[::-1])
    os.utime(move.source, ns=(0, 0))


def a_link_in_its_place(move: Move) -> None:
    victim = move.note.parent / "victim"
    victim.write_bytes(CONTENT[: 2 * DURABLE])
    move.part.unlink()
    move.part.symlink_to(victim)


HARMS = (
    *(zeros_at_the_end, zeros_where_it_was_noted, shorter, gone, torn_note, note_of_nothing, no_note),
    *(another_source, a_link_in_its_place),
)


@pytest.mark.parametrize("harm", HARMS, ids=[harm.__name__ for harm in HARMS])
def test_a_delivered_file_is_whole_whatever_happened_to_its_part(
    move: Move, harm: Callable[[Move], None]
) -> None:
    move.interrupted()
    harm(move)
    wanted = move.source.read_bytes()
    move.go()
    assert move.target.read_bytes() == wanted
    assert not move.target.is_symlink()
    assert not move.source.exists()
    victim = move.note.parent / "victim"
    assert not victim.exists() or victim.read_bytes() == CONTENT[: 2 * DURABLE], (
        "nothing is written through links"
    )


def test_the_source_is_there_until_the_file_has_its_name(move: Move) -> None:
    """Else a share that goes away meanwhile would take the only copy with it."""
    with dying_at(files, "rename_new", move.part):
        move.go()
    assert move.source.read_bytes() == move.part.read_bytes() == CONTENT
    move.go()
    assert move.target.read_bytes() == CONTENT


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_part_that_was_about_to_be_renamed_and_is_gone_was_renamed_unless_the_disk_is_another(
    move: Move, same_disk: bool
) -> None:
    """A consumer may have taken the file; a share that is not mounted has neither."""
    with dying_at(Path, "unlink", move.source):
        move.go()
    move.target.unlink()
    if not same_disk:
        move.note.write_text(move.note.read_text().replace('"device": ', '"device": 1'))
    move.go()
    assert not move.source.exists()
    assert move.target.exists() is not same_disk


@pytest.mark.parametrize("links", [True, False])
def test_a_crash_within_a_rename_in_two_steps_leaves_neither_a_second_nor_an_empty_file(
    move: Move, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Without the kernel's own way the new name is a link first or, where there are none, an empty file."""
    link = os.link

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def link_and_die(source: Path, target: Path) -> None:
        link(source, target)
        raise Died

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patched:
        without_renameat2(patched)
        patched.setattr(os, "link", link_and_die if links else refuse)
        if not links:
            replace = Path.replace
            patched.setattr(Path, "replace", lambda a, b: die() if a == move.part else replace(a, b))
        with pytest.raises(Died):
            move.go()
    assert move.target.exists()
    move.go()
    assert [path.name for path in move.target.parent.iterdir()] == ["a"]
    assert move.target.read_bytes() == CONTENT


# Rights

GROUP = 4242


def acl_of(*entries: tuple[int, int, int]) -> bytes:
    """Write an ACL as the kernel keeps it: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, perm, who) for tag, perm, who in entries)


NOBODY = 0xFFFFFFFF
DEFAULT_ACL = acl_of(
    (0x01, 7, NOBODY), (0x02, 7, 4343), (0x04, 5, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)
)  # owner, user 4343, group, mask, others


@pytest.fixture(params=[0o022, 0o077], ids=["open umask", "closed umask"])
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to any group")
@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("how", ["renamed", "copied", "not a member of the group"])
@pytest.mark.parametrize("acl", [False, True], ids=["setgid", "default ACL"])
def test_a_file_has_the_group_and_the_acl_of_the_folder_it_is_put_into(
    move: Move, monkeypatch: pytest.MonkeyPatch, how: str, acl: bool
) -> None:
    if how != "copied":
        monkeypatch.undo()
    if how == "not a member of the group":

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "fchown", refuse)
    folder = move.target.parent
    os.chown(folder, -1, GROUP)
    folder.chmod(0o2770)
    if acl:
        try:
            os.setxattr(folder, "system.posix_acl_default", DEFAULT_ACL)
        except OSError as error:
            pytest.skip(f"no ACLs here: {error}")
    move.source.chmod(0o600)
    move.go()
    status = move.target.stat()
    assert status.st_gid == GROUP
    assert stat.S_IMODE(status.st_mode) == 0o660
    if acl:
        new = folder / "new"
        new.touch()
        assert os.getxattr(move.target, moving.ACL) == os.getxattr(new, moving.ACL)
    elif moving.ACL in os.listxattr(move.target):
        pytest.fail("it has an ACL from nowhere")


@pytest.mark.parametrize(("folder", "mode"), [(0o755, 0o644), (0o700, 0o600), (0o777, 0o644)])
@pytest.mark.usefixtures("umask")
def test_in_a_folder_that_is_not_shared_a_file_is_as_readable_as_the_folder(
    move: Move, monkeypatch: pytest.MonkeyPatch, folder: int, mode: int
) -> None:
    monkeypatch.undo()
    move.target.parent.chmod(folder)
    move.go()
    assert stat.S_IMODE(move.target.stat().st_mode) == mode
