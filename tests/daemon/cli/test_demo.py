"""The demo: what it keeps, how long it waits, what it says before and after."""

import os
import subprocess
from pathlib import Path

import pytest

from framepackd.cli.demo import STALL_SECONDS, DemoError, Patience, set_aside, what_next
from framepackd.jobs.lock import Lock

ROOT = Path(__file__).parents[3]


def make_results(folder: Path, name: str) -> None:
    (folder / "state/framepackd.db").write_text("")
    (folder / f"outbox/{name}.mp4").write_text(name)


def test_what_earlier_demos_made_moves_to_numbered_folders_and_is_never_removed(tmp_path: Path) -> None:
    set_aside(tmp_path)
    for name in ("lake", "mine", "lake"):
        make_results(tmp_path, name)
        set_aside(tmp_path)
        assert list((tmp_path / "outbox").iterdir()) == []
    kept = {path.parent.parent.name: path.read_text() for path in tmp_path.glob("earlier/*/outbox/*.mp4")}
    assert kept == {"1": "lake", "2": "mine", "3": "lake"}


def test_the_folders_of_a_demo_that_runs_are_not_moved_away(tmp_path: Path) -> None:
    set_aside(tmp_path)
    make_results(tmp_path, "lake")
    lock = Lock(tmp_path / "state")
    try:
        with pytest.raises(DemoError, match="a demo runs in"):
            set_aside(tmp_path)
    finally:
        lock.release()
    assert (tmp_path / "outbox/lake.mp4").exists()


def test_the_demo_waits_as_long_as_there_is_progress() -> None:
    patience = Patience(now=0.0)
    hours = [patience.is_over(("running", f"step {number}"), number * 500.0) for number in range(100)]
    assert not any(hours)
    assert not patience.is_over(("running", "step 99"), 99 * 500.0 + STALL_SECONDS)
    assert patience.is_over(("running", "step 99"), 99 * 500.0 + STALL_SECONDS + 1)


def test_the_next_commands_are_for_an_own_picture_the_page_and_the_real_model() -> None:
    lines = what_next().splitlines()
    commands = [line for line in lines[1:] if line and "#" not in line]
    assert ["demo --image" in commands[0], "demo --web" in commands[1], "init" in commands[2]] == [True] * 3
    assert "models download" in commands[2]


def test_make_says_how_much_it_fetches_before_pip_starts_and_nothing_once_it_is_installed(
    tmp_path: Path,
) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        (tmp_path / name).touch()

    def told() -> str:
        alone = {
            key: value for key, value in os.environ.items() if not key.startswith("MAKE")
        }  # of make test
        command = ["make", "--dry-run", "demo"]
        return subprocess.run(command, cwd=tmp_path, env=alone, stdout=-1, text=True, check=True).stdout

    assert 0 < told().index("1.6 GB") < told().index("-m venv") < told().index("pip install")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/package").touch()
    newer = (tmp_path / "setup.py").stat().st_mtime + 9
    os.utime(tmp_path / ".venv/package", (newer, newer))
    assert told().split() == [".venv/bin/framepackd", "demo"]
