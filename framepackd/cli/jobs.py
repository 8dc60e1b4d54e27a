"""The commands on jobs: list, show, retry, final, dismiss, cancel, top, pause, resume."""

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from framepackd.cli.options import config_option, fail, load
from framepackd.text import printable, printable_json

if TYPE_CHECKING:
    from framepackd.jobs.job import Job
    from framepackd.settings.config import Config

STATES = ("queued", "running", "done", "failed", "cancelled", "skipped")
UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Moment(click.ParamType[datetime]):
    """A day, a day with a time, or a span before now: 2026-11-28, "2026-11-28 21:30", today, 12h, 3d."""

    name = "WHEN"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Give the moment in UTC; days and times are this machine's."""
        if isinstance(value, datetime):
            return value
        now = datetime.now().astimezone()
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        words = {"today": midnight, "yesterday": midnight - timedelta(days=1)}
        text = str(value).strip().lower()
        if text in words:
            return words[text].astimezone(UTC)
        try:
            if span := re.fullmatch(rf"(\d+)\s*({'|'.join(UNITS)})", text):
                return (now - timedelta(**{UNITS[span[2]]: int(span[1])})).astimezone(UTC)
            return datetime.fromisoformat(text).astimezone().astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is no time: write 2026-11-28, '2026-11-28 21:30', today, yesterday, 12h or 3d"
            )


@click.command("list", short_help="List every job there was, by state, folder and time.")
@config_option
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="Only these; repeatable.")
@click.option("--folder", help="Only jobs dropped in this folder of the inbox, or below it.")
@click.option("--since", type=Moment(), help="Only those taken or ended since: 2026-11-28, today, 12h, 3d.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def list_jobs(
    config_file: Path | None,
    states: tuple[str, ...],
    folder: str | None,
    since: datetime | None,
    *,
    as_json: bool,
) -> None:
    """List jobs, the latest first: every one that was ever taken, or those that you ask for."""
    config = load(config_file)
    from framepackd.control.facts import facts_of
    from framepackd.control.schedule import UNKNOWN
    from framepackd.control.status import summary
    from framepackd.jobs.store import JobStore

    store = JobStore(config.database, read_only=True) if config.database.exists() else None
    jobs = store.all_jobs(states, folder, since) if store else iter(())
    if as_json:
        now, kinds = datetime.now(UTC), config.model_kinds()
        failures = {job.id for job in store.open_failures()} if store else ()
        reports = [
            summary(job, facts=facts_of(job, kinds, UNKNOWN), now=now, is_open=job.id in failures)
            for job in jobs
        ]
        click.echo(printable_json({"jobs": reports}))
        return
    for line in lines(jobs):
        click.echo(line)


def lines(jobs: "Iterator[Job]") -> Iterator[str]:
    """Write a line a job: its state, when it ended or was taken, its name, and its error or its video."""
    for job in jobs:
        when = datetime.fromisoformat(job.finished_at or job.created_at).astimezone()
        note = job.error or (job.delivery["error"] if job.delivery else None) or job.output or ""
        draft = "  (draft)" if job.settings.get("draft") else ""
        yield f"{job.state:9}  {when:%Y-%m-%d %H:%M}  {job.path}{draft}  {printable(note)}".rstrip()


@click.command()
@config_option
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def show(config_file: Path | None, job: str, *, as_json: bool) -> None:
    """Show one job whole. JOB is its id, the start of it, or its name."""
    config = load(config_file)
    from framepackd.control import client

    try:
        record, _ = client.show(config, job)
    except Exception as error:  # whatever it is: it cannot be shown
        fail(f"{config.state_dir}: {error}", 1)
    if record is None:
        fail(f"no job {job!r}: framepackd status lists them", 1)
    if as_json:
        click.echo(printable_json(record))
    else:
        from framepackd.cli import display, page_of_job

        display.show(page_of_job.page(record, datetime.now(UTC)))


named_jobs_argument = click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
jobs_argument = click.argument("jobs", metavar="[JOB]...", nargs=-1)


@click.command(short_help="Run failed or cancelled jobs again.")
@config_option
@jobs_argument
@click.option("--failed", is_flag=True, help="All jobs that have failed.")
@click.option(
    "--anew", is_flag=True, help="From the beginning, queued jobs too; what was made is kept aside."
)
def retry(config_file: Path | None, jobs: tuple[str, ...], *, failed: bool, anew: bool) -> None:
    """Run failed or cancelled jobs again, as they were asked for and with the same seed.

    JOB is its id, the start of it, or its name.
    """
    config = load(config_file)
    if failed != (not jobs):
        raise click.UsageError("name the jobs to run again, or say --failed for all that have failed")
    jobs = jobs or _ids(config, "failed")
    change(config, {"command": "retry", "jobs": jobs, "anew": anew})


@click.command(short_help="Make drafts again at full quality.")
@config_option
@named_jobs_argument
def final(config_file: Path | None, jobs: tuple[str, ...]) -> None:
    """Make the videos of drafts again, with the same seed and all their steps; the drafts stay.

    JOB is its id, the start of it, or its name.
    """
    change(load(config_file), {"command": "final", "jobs": jobs})


@click.command(short_help="Put away failures that you know of.")
@config_option
@jobs_argument
@click.option("--all", "every", is_flag=True, help="All failures that status shows.")
def dismiss(config_file: Path | None, jobs: tuple[str, ...], *, every: bool) -> None:
    """Put away failed jobs that you know of: status and the page show them no more.

    Their files stay in the failed folder. JOB is its id, the start of it, or its name.
    """
    config = load(config_file)
    if every != (not jobs):
        raise click.UsageError("name the jobs to put away, or say --all for all failures that status shows")
    if every:
        from framepackd.jobs.store import JobStore

        store = JobStore(config.database, read_only=True) if config.database.exists() else None
        jobs = tuple(job.id for job in store.open_failures()) if store else ()
        if not jobs:
            click.echo("no failure is shown")
            sys.exit(0)
    change(config, {"command": "dismiss", "jobs": jobs})


@click.command(short_help="Cancel queued or running jobs.")
@config_option
@jobs_argument
@click.option("--all", "whole_queue", is_flag=True, help="The running job, and all that are queued.")
@click.option("--keep", is_flag=True, help="Deliver what exists of a video that is being made.")
def cancel(config_file: Path | None, jobs: tuple[str, ...], *, whole_queue: bool, keep: bool) -> None:
    """Cancel queued or running jobs; their files go to the failed folder.

    JOB is its id, the start of it, or its name.
    """
    config = load(config_file)
    if whole_queue != (not jobs):
        raise click.UsageError("name the jobs to cancel, or say --all for the whole queue")
    jobs = jobs or _ids(config, "queued", "running")
    change(config, {"command": "cancel", "jobs": jobs, "keep": keep})


@click.command(short_help="Let queued jobs run next.")
@config_option
@named_jobs_argument
def top(config_file: Path | None, jobs: tuple[str, ...]) -> None:
    """Let queued jobs run next, in the order given.

    JOB is its id, the start of it, or its name.
    """
    change(load(config_file), {"command": "top", "jobs": jobs})


@click.command(short_help="Free the GPU; start no job until resume.")
@config_option
def pause(config_file: Path | None) -> None:
    """Stop the running job at its next step, free the GPU, and start none until framepackd resume."""
    change(load(config_file), {"command": "pause"})


@click.command(short_help="Let the queue run again.")
@config_option
def resume(config_file: Path | None) -> None:
    """Let the queue run again after framepackd pause."""
    change(load(config_file), {"command": "resume"})


def _ids(config: "Config", *states: str) -> tuple[str, ...]:
    """List the ids of all jobs in some states; ends the command if there are none."""
    from framepackd.jobs.store import JobStore

    store = JobStore(config.database, read_only=True) if config.database.exists() else None
    found = tuple(job.id for job in store.all_jobs(states))[::-1] if store else ()  # as they were taken
    if not found:
        click.echo(f"no job is {' or '.join(states)}")
        sys.exit(0)
    return found


def change(config: "Config", request: dict[str, Any]) -> NoReturn:
    """Send a command to the daemon, or perform it if none runs; print the results, and end."""
    from framepackd.control import client

    done = True
    try:
        for results in client.change(config, request):
            for result in results:
                line = printable(result["message"])
                click.echo(line if result["done"] else f"framepackd: {line}", err=not result["done"])
                done &= result["done"]
    except OSError as error:
        fail(f"{config.state_dir}: {error}", 1)
    sys.exit(0 if done else 1)
