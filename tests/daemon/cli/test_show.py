"""framepackd show: one job as a page."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from framepackd.cli import display
from framepackd.cli.main import main
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Give a configuration whose database holds a failed job that has not begun, delivered as cat-2."""
    JobStore(tmp_path / "framepackd.db").add(
        Job(
            id="20261128-101112-00000a",
            name="cat",
            folder="pets",
            state=State.FAILED,
            created_at="2026-11-28T10:11:12Z",
            finished_at="2026-11-28T10:11:20Z",
            error="cat.png is no picture that anybody can read, whatever is tried with it",
            settings={"prompt": "the cat sits down and looks around. " * 5, "seed": 7, "negative_prompt": ""},
            stem="cat-2",
        )
    )
    path = tmp_path / "config.toml"
    path.write_text(f'state_dir = "{tmp_path}"\n')
    return path


def shown(config: Path) -> str:
    result = CliRunner().invoke(main, ["show", "--config", str(config), "cat"])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_failed_job_says_where_its_files_and_its_reason_lie(config: Path) -> None:
    text = shown(config)
    assert re.search(rf"files in +{re.escape(str(config.parent / 'failed' / 'pets'))}\n", text)
    assert re.search(r"reason in +cat-2\.error\.txt\n", text)
    assert "reason file" not in text, "it is told once"


def test_what_never_was_is_not_shown(config: Path) -> None:
    text = shown(config)
    assert not re.search(r"  (0|0\.0|None|False|\[\]|\{\})$", text, re.MULTILINE)
    for never in ("started", "size", "sections", "negative prompt", "resumed", "attempts"):
        assert not re.search(rf"^  {never} ", text, re.MULTILINE), never


def test_times_are_this_machines(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        text = shown(config)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert re.search(r"taken in +2026-11-28 19:11:12", text)
    assert "Z\n" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_cut_longer_than_the_terminal_or_ends_in_blanks(
    config: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PIPED_WIDTH", width)
    text = shown(config)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
