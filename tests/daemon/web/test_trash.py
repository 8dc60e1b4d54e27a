"""The trash: a result goes there whole, also where the folder is another disk to us."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from framepackd.files import moving
from framepackd.settings.config import Config
from framepackd.web.gallery import Gallery
from framepackd.web.trash import move_to_trash
from tests.daemon.web.results import finished

MEMORY = Path("/dev/shm")  # noqa: S108 - another file system


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        state_dir=tmp_path / "state", inbox=tmp_path / "in", outbox=tmp_path / "out", failed=tmp_path / "no"
    )


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.mark.skipif(not MEMORY.is_dir(), reason="there is no other file system")
def test_a_result_goes_whole_to_a_trash_on_another_disk(config: Config, elsewhere: Path) -> None:
    config.trash.symlink_to(elsewhere)
    (wanted,) = finished(config.outbox, 1)
    (config.outbox / "made-000.draft.json").write_text("{}")  # comes with a final
    before = {path.name: path.read_bytes() for path in config.outbox.glob("made-000*")}
    shown = Gallery(config.outbox).find(wanted)
    assert shown
    target = move_to_trash(config, shown)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert not list(config.outbox.glob("*made-000*"))
    assert not list(config.outbox.glob(".*"))


def test_what_was_moved_is_put_back_when_the_rest_cannot_be(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wanted,) = finished(config.outbox, 1)
    before = {path.name for path in config.outbox.iterdir()}
    whole = moving.move

    def full(source: Path, target: Path, *, part: str) -> None:
        if source.suffix == ".png" and source.parent == config.outbox:
            raise OSError("no space left")
        whole(source, target, part=part)

    monkeypatch.setattr(moving, "move", full)
    shown = Gallery(config.outbox).find(wanted)
    assert shown
    with pytest.raises(OSError, match="no space"):
        move_to_trash(config, shown)
    assert {path.name for path in config.outbox.iterdir()} == before
