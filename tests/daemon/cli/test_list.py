"""framepackd list: every job there ever was, by state, folder and time."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from framepackd.cli.main import main
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Give a configuration whose database holds four jobs: taken 3 days, 2 days, 1 day, an hour ago."""
    store = JobStore(tmp_path / "framepackd.db")
    now = datetime.now(UTC)
    for name, folder, state, hours in (
        ("otter", "", State.DONE, 72),
        ("cat", "pets", State.FAILED, 48),
        ("dog", "pets/large", State.QUEUED, 24),
        ("wave", "petsnot", State.QUEUED, 1),
    ):
        taken = f"{now - timedelta(hours=hours):%Y-%m-%dT%H:%M:%SZ}"
        ended = taken if state in (State.DONE, State.FAILED) else None
        store.add(
            Job(
                id=f"20261128-101112-{hours:06x}",
                name=name,
                folder=folder,
                state=state,
                created_at=taken,
                finished_at=ended,
                open_since=ended if state == State.FAILED else None,
                error="cat.png is no picture" if state == State.FAILED else None,
            )
        )
    path = tmp_path / "config.toml"
    path.write_text(f'state_dir = "{tmp_path}"\n')
    return path


def listed(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["list", "--config", str(config), *arguments])


def names(config: Path, *arguments: str) -> list[str]:
    result = listed(config, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [job["name"] for job in json.loads(result.output)["jobs"]]


def test_all_jobs_are_listed_the_latest_first(config: Path) -> None:
    assert names(config) == ["wave", "dog", "cat", "otter"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--state", "failed"], ["cat"]),
        (["--state", "failed", "--state", "done"], ["cat", "otter"]),
        (["--folder", "pets"], ["dog", "cat"]),
        (["--folder", "pets/"], ["dog", "cat"]),
        (["--folder", "nothing"], []),
        (["--since", "30h"], ["wave", "dog"]),
        (["--since", "1w"], ["wave", "dog", "cat", "otter"]),
        (["--since", "2 d", "--state", "queued"], ["wave", "dog"]),
    ],
)
def test_jobs_are_chosen_by_state_folder_and_time(
    config: Path, arguments: list[str], expected: list[str]
) -> None:
    assert names(config, *arguments) == expected


def test_a_day_is_this_machines(config: Path) -> None:
    today = datetime.now().astimezone()
    assert names(config, "--since", f"{today - timedelta(days=4):%Y-%m-%d}") == names(config)
    assert names(config, "--since", f"{today + timedelta(days=2):%Y-%m-%d}") == []


def test_a_time_that_is_none_is_refused_with_examples(config: Path) -> None:
    result = listed(config, "--since", "soon")
    assert result.exit_code == 2
    assert "'soon' is no time: write 2026-11-28" in result.output


def test_a_line_says_state_time_name_and_why(config: Path) -> None:
    line = next(line for line in listed(config).output.splitlines() if "cat" in line)
    assert line.startswith("failed     20")
    assert line.endswith("  pets/cat  cat.png is no picture")


def test_no_line_ends_in_blanks(config: Path) -> None:
    lines = listed(config).output.splitlines()
    assert len(lines) == 4
    assert [line.rstrip() for line in lines] == lines


def test_before_anything_was_run_the_list_is_empty(tmp_path: Path) -> None:
    empty = tmp_path / "config.toml"
    empty.write_text(f'state_dir = "{tmp_path}/none"\n')
    assert listed(empty).output == ""
    assert not (tmp_path / "none").exists()


def test_all_failed_jobs_can_be_named_at_once(config: Path) -> None:
    result = CliRunner().invoke(main, ["retry", "--failed", "--config", str(config)])
    assert "pets/cat" in result.output
    assert "otter" not in result.output


def test_the_whole_queue_can_be_cancelled_at_once(config: Path) -> None:
    CliRunner().invoke(main, ["cancel", "--all", "--config", str(config)])
    assert names(config, "--state", "queued") == []
    assert names(config, "--state", "cancelled") == ["wave", "dog"]
    again = CliRunner().invoke(main, ["cancel", "--all", "--config", str(config)])
    assert (again.exit_code, again.output) == (0, "no job is queued or running\n")


@pytest.mark.parametrize(
    "command", [["retry"], ["retry", "cat", "--failed"], ["cancel"], ["cancel", "a", "--all"]]
)
def test_jobs_are_named_or_all_are_meant_but_not_both(config: Path, command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--config", str(config)])
    assert result.exit_code == 2
    assert "name the jobs" in result.output


def test_a_failure_is_shown_until_it_is_dismissed_retried_or_dropped_again(config: Path) -> None:
    store = JobStore(config.parent / "framepackd.db")
    (failed,) = store.open_failures()
    assert failed.name == "cat"

    def dismiss(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["dismiss", *arguments, "--config", str(config)])

    refused = dismiss("dog")
    assert refused.exit_code == 1
    assert "is queued and cannot be dismissed: only failures are put away" in refused.output
    done = dismiss("--all")
    assert done.exit_code == 0, done.output
    assert "(pets/cat) is put away; framepackd retry still runs it again" in done.output
    assert store.open_failures() == []
    assert dismiss("--all").output == "no failure is shown\n"


def test_a_failure_whose_files_were_dropped_again_is_not_open_any_more(config: Path) -> None:
    store = JobStore(config.parent / "framepackd.db")
    store.add(Job(id="later", name="cat", folder="other", state=State.QUEUED, created_at="2026-11-28"))
    assert [job.name for job in store.open_failures()] == ["cat"]
    store.add(Job(id="last", name="cat", folder="pets", state=State.QUEUED, created_at="2026-11-28"))
    assert store.open_failures() == []


def test_an_open_failure_is_shown_behind_any_number_of_later_results(config: Path) -> None:
    store = JobStore(config.parent / "framepackd.db")
    for number in range(120):
        name = f"n{number}"
        store.add(
            Job(id=name, name=name, state=State.DONE, created_at="2099", finished_at="2099-01-01T00:00:00Z")
        )
    result = CliRunner().invoke(main, ["status", "--json", "--config", str(config)])
    jobs = json.loads(result.output)["jobs"]
    assert [job["name"] for job in jobs if job["open"]] == ["cat"]
    shown = CliRunner().invoke(main, ["status", "--config", str(config)])
    assert "cat.png is no picture" in shown.output
