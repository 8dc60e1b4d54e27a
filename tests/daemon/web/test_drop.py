"""A drop is in the inbox whole, or not at all, and then the caller learns why."""

import errno
import os
import resource
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framepack_core.errors import RequestError
from framepackd import files
from framepackd.settings.config import Config, load_config
from framepackd.web import drop as dropping
from framepackd.web.drop import UNFINISHED, UNFINISHED_SECONDS, drop, remove_unfinished
from tests.acceptance.conftest import picture

HALF = "pan left \ud83d"  # of an emoji


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.toml"
    path.write_text('state_dir = "state"\ninbox = "inbox"\n')
    (tmp_path / "inbox").mkdir()
    return load_config(path)


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    return picture(tmp_path / "uploads/cat.png", size=(100, 100))


def dropped(config: Config) -> list[str]:
    return sorted(str(path.relative_to(config.inbox)) for path in config.inbox.rglob("*"))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": HALF}, "the prompt cannot be written as UTF-8: character 10 is half of one .U.D83D."),
        ({"prompt": "pan\0left"}, "null character"),
        ({"prompt": "x" * 70_000}, "the prompt has 70000 bytes: it may have 65536"),
        ({"settings": {"n_prompt": "x" * 9000}}, "it|they may have 8192"),
        ({"settings": {"n_prompt": HALF}}, "the settings"),
        ({"settings": {"seconds": 1000}}, "must be"),
        ({"settings": {"seconds": float("nan")}}, "must be"),
        ({"end_picture": Path("end.gif")}, "the picture is a .gif"),
        ({"end_picture": Path("gone.png")}, "gone.png is not here any more: upload it again"),
        ({"picture": Path("gone.png")}, "gone.png is not here any more"),
        ({"picture": Path("cat")}, "file without an ending"),
        ({"picture": Path("cat.png\0")}, "png"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(
    config: Config, cat: Path, asked: dict[str, Any], told: str
) -> None:
    whole: dict[str, Any] = {"picture": cat, "prompt": "pan left", "settings": {}, "end_picture": cat} | asked
    with pytest.raises((RequestError, OSError), match=told):
        drop(config, **whole)
    assert dropped(config) == []


class Fails:
    """Makes a function fail at its n-th call, as on a full disk."""

    def __init__(self, function: Callable[..., Any], call: int) -> None:
        self.function = function
        self.left = call

    def __call__(self, *given: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*given)


STEPS = [
    *((dropping.shutil, "copyfile", 2), (files, "sync_file", 4)),
    *((files, "rename_new", 4), (files, "sync_folder", 2)),
]


@pytest.mark.parametrize(
    ("where", "function", "call"),
    [(where, function, call + 1) for where, function, calls in STEPS for call in range(calls)],
)
def test_a_disk_that_is_full_at_any_step_leaves_nothing_behind(
    config: Config, cat: Path, monkeypatch: pytest.MonkeyPatch, where: Any, function: str, call: int
) -> None:
    monkeypatch.setattr(where, function, Fails(getattr(where, function), call))
    with pytest.raises(OSError, match=r"nothing was dropped, .*: No space left on device"):
        drop(config, picture=cat, end_picture=cat, prompt="pan left", settings={})
    assert dropped(config) == []
    drop(config, picture=cat, end_picture=cat, prompt="pan left", settings={})
    assert len(dropped(config)) == 5


def test_a_picture_that_cannot_be_written_whole_leaves_nothing_behind(config: Config, cat: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cat.stat().st_size // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"nothing was dropped, .*: File too large"):
            drop(config, picture=cat, prompt="pan left", settings={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert dropped(config) == []


def test_other_jobs_in_the_folder_stay(config: Config, cat: Path) -> None:
    drop(config, picture=cat, prompt="pan left", settings={})
    before = dropped(config)
    with pytest.raises(RequestError):
        drop(config, picture=cat, prompt=HALF, settings={})
    assert dropped(config) == before


def test_prompts_come_as_they_are(config: Config, cat: Path) -> None:
    prompt = "a\x07bell,\r\na line \x1b[31m, Я, 🎬 and \x85\u2028"
    name = drop(config, picture=cat, prompt=prompt, settings={"n_prompt": 'no "\x00\x7f\\ 🎬'})
    folder = config.inbox / "web"
    assert (folder / f"{name}.txt").read_bytes() == prompt.encode()
    assert tomllib.loads((folder / f"{name}.toml").read_text()) == {"n_prompt": 'no "\x00\x7f\\ 🎬'}
    assert (folder / f"{name}.png").read_bytes() == cat.read_bytes()


@pytest.mark.parametrize("prompt", ["", " \n", "\ufeff "])
def test_no_prompt_is_meant(config: Config, cat: Path, prompt: str) -> None:
    name = drop(config, picture=cat, prompt=prompt, settings={})
    assert tomllib.loads((config.inbox / f"web/{name}.toml").read_text()) == {"prompt": ""}
    assert not (config.inbox / f"web/{name}.txt").exists()


def test_unfinished_drops_of_a_killed_page_are_removed_and_no_file_of_the_daemon(config: Config) -> None:
    folder = config.inbox / "web"
    folder.mkdir()
    (old, new, daemons) = (
        folder / name
        for name in (
            f"{UNFINISHED}a.png.part",
            f"{UNFINISHED}b.png.part",
            f"{files.PART_PREFIX}id-c.png.part",
        )
    )
    for path in (old, new, daemons):
        path.touch()
    past = old.stat().st_mtime - UNFINISHED_SECONDS - 10
    for path in (old, daemons):
        os.utime(path, (past, past))
    remove_unfinished(config)
    assert [path.exists() for path in (old, new, daemons)] == [False, True, True]


def test_a_video_with_warnings_is_done_and_says_them() -> None:
    job = {"state": "done", "frames": 145, "fps": 30, "quality": None, "warnings": ["prompt is cut: …"]}
    assert dropping.describe(job) == "done: 145 frames, 4.83 s; prompt is cut: …"
    assert dropping.describe(job | {"quality": "frozen"}).endswith(", but looks frozen; prompt is cut: …")
