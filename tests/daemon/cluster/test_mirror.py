"""What a node tells of its files is written as a worker here would; what no worker tells is refused."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framepackd import files
from framepackd.cluster.mirror import OPEN_FILES, Mirror
from framepackd.cluster.names import RefusedError
from framepackd.worker.messages import Clear, Kept, Moved
from tests.daemon.worker.checkpoints import contents, save_all

LARGEST = 1 << 20


def kept(name: str, content: bytes = b"x", **other: Any) -> Kept:
    return Kept("job", name, **{"size": len(content), "offset": 0, "content": content} | other)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "jobs" / "one"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def mirror(work: Path) -> Mirror:
    return Mirror(work, LARGEST)


LIES = [
    "../two/result/.mp4",
    "/etc/passwd",
    "result/../../two/result/.mp4",
    "checkpoint/../manifest.json",
    "manifest.json",
    "delivery.json",
    "inputs/cat.png",
    "continued/old.mp4",
    "result/evil.sh",
    "result/.mp4/",
    "result//.mp4",
    "checkpoint/state-1",
    "checkpoint/state-00000001\n",
    "checkpoint/state-" + "0" * 5000,
    "checkpoint/clip-0001/../state-00000001",
    "checkpoint/clip-0001/clip-0002/state-00000001",
    "checkpoint/given-up",
    "checkpoint.aside-1/given-up",
    "checkpoint/clip-0001.lock",
    "",
    ".",
    "checkpoint",
    "result",
    "\0",
    "checkpoint/état-00000001",
    "checkpoint/state-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661",  # digits of another script
]


@pytest.mark.parametrize("name", LIES)
def test_a_name_that_no_worker_writes_is_refused_and_nothing_is_written(
    work: Path, mirror: Mirror, name: str
) -> None:
    (work / "manifest.json").write_text("{}")
    before = tree(work.parent)
    for tell in (lambda: mirror.keep(kept(name)), lambda: mirror.clear(Clear("job", name))):
        with pytest.raises(RefusedError):
            tell()
    for move in ((name, "checkpoint.aside-1"), ("checkpoint", name), (name, name)):
        if move != ("checkpoint", "checkpoint.aside-1"):
            with pytest.raises(RefusedError):
                mirror.move(Moved("job", *move))
    assert tree(work.parent) == before


@given(
    st.text() | st.lists(st.sampled_from(["..", "result", "checkpoint", ".mp4", "", "~", "x"])).map("/".join)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_name_is_nothing_outside_the_folder_changes(work: Path, name: str) -> None:
    mirror = Mirror(work, LARGEST)
    (work.parent / "two").mkdir(exist_ok=True)
    outside = [path for path in work.parent.parent.rglob("*") if not path.is_relative_to(work)]
    for tell in (
        lambda: mirror.keep(kept(name)),
        lambda: mirror.clear(Clear("job", name)),
        lambda: mirror.move(Moved("job", name, "checkpoint.aside-1")),
    ):
        with contextlib.suppress(RefusedError):
            tell()
    assert [path for path in work.parent.parent.rglob("*") if not path.is_relative_to(work)] == outside


@pytest.mark.parametrize(
    "part",
    [
        kept("result/.mp4", size=10**12),
        kept("result/.mp4", size=LARGEST + 1),
        kept("result/.mp4", size=-1),
        kept("result/.mp4", size=0),
        kept("result/.mp4", offset=1, size=2),
        kept("result/.mp4", offset=-1),
        kept("result/.mp4", b"", size=1),
        kept("result/.mp4", b"12345", size=4),
    ],
)
def test_a_part_that_cannot_be_the_first_of_its_file_is_refused(
    work: Path, mirror: Mirror, part: Kept
) -> None:
    with pytest.raises(RefusedError):
        mirror.keep(part)
    assert not tree(work)


@pytest.mark.parametrize(
    "second",
    [
        kept("result/.mp4", b"cd", offset=3, size=6),
        kept("result/.mp4", b"cd", offset=0, size=6),
        kept("result/.mp4", b"cd", offset=2, size=7),
        kept("result/.mp4", b"cd", offset=2, size=6, durable=False),
        kept("result/.mp4", b"cdefg", offset=2, size=6),
    ],
)
def test_a_part_that_does_not_follow_is_refused_and_the_file_keeps_what_it_was(
    work: Path, mirror: Mirror, second: Kept
) -> None:
    mirror.keep(kept("result/.mp4", b"before"))
    mirror.keep(kept("result/.mp4", b"ab", size=6))
    with pytest.raises(RefusedError):
        mirror.keep(second)
    assert (work / "result" / ".mp4").read_bytes() == b"before"


def test_files_without_end_that_are_begun_and_never_whole_are_refused(mirror: Mirror) -> None:
    for number in range(OPEN_FILES):
        mirror.keep(kept(f"result/.section-{number}.png", size=2))
    with pytest.raises(RefusedError, match="in parts"):
        mirror.keep(kept("result/.mp4", size=2))


@pytest.mark.parametrize("link", ["result", "checkpoint", "checkpoint/clip-0001"])
def test_a_folder_that_is_a_link_is_not_followed(
    work: Path, mirror: Mirror, link: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (work / link).parent.mkdir(exist_ok=True)
    (work / link).symlink_to(tmp_path / "elsewhere")
    name = {"result": ".mp4"}.get(link, "state-00000001")
    (tmp_path / "elsewhere" / name).write_bytes(b"theirs")
    for tell in (
        lambda: mirror.keep(kept(f"{link}/{name}")),
        lambda: mirror.clear(Clear("job", f"{link}/{name}")),
    ):
        with pytest.raises(OSError):  # noqa: PT011 - of two kinds
            tell()
    assert tree(tmp_path / "elsewhere") == {name: b"theirs"}


def test_a_hidden_part_that_is_a_link_is_not_followed(work: Path, mirror: Mirror, tmp_path: Path) -> None:
    (work / "result").mkdir()
    (tmp_path / "theirs").write_bytes(b"theirs")
    files.hidden_part(work / "result" / ".mp4").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError):  # noqa: PT011 - ELOOP
        mirror.keep(kept("result/.mp4"))
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_several_files_in_turn_make_whole_files(work: Path, data: st.DataObject) -> None:
    mirror = Mirror(work, LARGEST)
    wanted = {
        f"result/.section-{number}.png": data.draw(st.binary(max_size=40)) for number in range(OPEN_FILES)
    }
    parts = []
    for name, content in wanted.items():
        size = data.draw(st.integers(1, 9))
        parts += [
            (name, kept(name, content[at : at + size], size=len(content), offset=at))
            for at in range(0, max(len(content), 1), size)
        ]
    order = data.draw(st.permutations([name for name, _ in parts]))
    queues = {name: [part for other, part in parts if other == name] for name in wanted}
    for name in order:
        mirror.keep(queues[name].pop(0))
    assert {name: (work / name).read_bytes() for name in wanted} == wanted


def told(folder: Path) -> list[Kept]:
    return [
        kept(f"checkpoint/{name}", content)
        for name, content in sorted(contents(folder).items(), key=lambda item: item[0].startswith("state"))
    ]


def test_a_file_that_a_state_names_is_not_overwritten_with_another_content(
    work: Path, mirror: Mirror, tmp_path: Path
) -> None:
    """This is what finds a mirror that overwrites a checkpoint."""
    save_all(tmp_path / "node")
    for part in told(tmp_path / "node"):
        mirror.keep(part)
    whole = contents(work / "checkpoint")
    assert whole == contents(tmp_path / "node")
    for name in whole:
        mirror.keep(kept(f"checkpoint/{name}", whole[name]))  # a job that is resumed may write it again
        with pytest.raises(RefusedError, match="again"):
            mirror.keep(kept(f"checkpoint/{name}", whole[name] + b"!"))
    assert contents(work / "checkpoint") == whole


def test_a_mirror_that_overwrites_a_checkpoint_is_found(
    work: Path, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sha256", lambda _: "same")  # the fault: each content is taken for the same
    with pytest.raises(pytest.fail.Exception):
        test_a_file_that_a_state_names_is_not_overwritten_with_another_content(work, mirror, tmp_path)


def test_latents_that_no_state_names_may_be_written_anew(work: Path, mirror: Mirror) -> None:
    """A job that died before its first state begins anew, perhaps on another kind of card."""
    mirror.keep(kept("checkpoint/latents-0000", b"of one card"))
    mirror.keep(kept("checkpoint/latents-0000", b"of another card"))
    assert (work / "checkpoint" / "latents-0000").read_bytes() == b"of another card"


@pytest.mark.parametrize("lie", [b"", b"\0" * 40, b"x" * 100])
def test_a_state_that_is_none_protects_nothing_and_breaks_nothing(
    work: Path, mirror: Mirror, lie: bytes
) -> None:
    signed = hashlib.sha256(lie).digest() + lie  # whoever lies can sign, too
    mirror.keep(kept("checkpoint/state-00000001", signed))
    mirror.keep(kept("checkpoint/latents-0000", b"one"))
    mirror.keep(kept("checkpoint/latents-0000", b"two"))
    assert (work / "checkpoint" / "latents-0000").read_bytes() == b"two"


def test_a_checkpoint_is_set_aside_and_restored(work: Path, mirror: Mirror) -> None:
    mirror.keep(kept("checkpoint/clip-0001/state-00000001"))
    mirror.keep(kept("checkpoint/clip-0001/segment-0000"))
    mirror.move(
        Moved("job", "checkpoint/clip-0001/segment-0000", "checkpoint/clip-0001.aside-1/segment-0000")
    )
    mirror.move(Moved("job", "checkpoint/clip-0001", "checkpoint/clip-0001.aside-2"))
    (work / "checkpoint" / "clip-0001").mkdir()  # it was begun anew, and interrupted
    files.hidden_part(work / "checkpoint" / "clip-0001" / "state-00000001").touch()
    mirror.move(Moved("job", "checkpoint/clip-0001.aside-2", "checkpoint/clip-0001"))
    mirror.move(Moved("job", "checkpoint/clip-0002", "checkpoint/clip-0002.aside-1"))  # empty at the node
    assert sorted(tree(work)) == [
        "checkpoint",
        "checkpoint/clip-0001",
        "checkpoint/clip-0001.aside-1",
        "checkpoint/clip-0001.aside-1/segment-0000",
        "checkpoint/clip-0001/state-00000001",
    ]


def test_a_move_onto_what_exists_is_refused(work: Path, mirror: Mirror) -> None:
    for folder in ("checkpoint", "checkpoint.aside-1"):
        mirror.keep(kept(f"{folder}/segment-0000", folder.encode()))
    before = tree(work)
    with pytest.raises(RefusedError, match="exists"):
        mirror.move(Moved("job", "checkpoint/segment-0000", "checkpoint.aside-1/segment-0000"))
    with pytest.raises(OSError):  # noqa: PT011 - ENOTEMPTY
        mirror.move(Moved("job", "checkpoint", "checkpoint.aside-1"))
    assert tree(work) == before


def test_what_is_durable_is_synced_before_it_has_its_name_and_a_preview_is_not_synced(
    work: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        calls.append("name")
        return replace(path, target)

    mirror.keep(kept("result/.section-0.png"))  # makes the folder
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    mirror.keep(kept("result/.mp4"))
    assert calls == ["file", "name", "folder"]
    calls.clear()
    mirror.keep(kept("preview.mp4", durable=False))
    assert calls == ["name"]
