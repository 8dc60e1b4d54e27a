"""Sends a command to the daemon or, where none runs, performs it.

Imports stand where they are needed: a command answers in half a second.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from framepackd.control import socket
from framepackd.jobs import lock as control_lock
from framepackd.problems import CommandError
from framepackd.settings.config import Config

if TYPE_CHECKING:
    from framepackd.control.commands import Answer, Result
    from framepackd.jobs.report import DaemonReport, FleetReport, Record, Report

EXIT_DIED, EXIT_NOT_RUNNING, EXIT_UNKNOWN = 1, 3, 4  # of status, as service managers have it
STARTING_SECONDS = 3.0
PART_SECONDS = 1.0  # that a part of a command on many jobs takes: the loop answers others in between
FIRST_PART, LARGEST_PART = 10, 100  # jobs


def report(config: Config) -> "tuple[Report, int]":
    """Ask the daemon for its snapshot, or take one where none runs; with the exit code of ``status``."""
    try:
        answer = ask(config, {"command": "status"})
        return (cast("Report", answer), 0) if answer is not None else _take_snapshot(config)
    except Exception as error:  # whatever it is: nothing is known
        daemon = _without_daemon(config, "unknown")
        daemon["error"] = f"cannot tell: {config.state_dir}: {error}"
        return {
            "daemon": daemon,
            "counts": {},
            "eta_seconds": None,
            "finishes_at": None,
            "jobs": [],
            "waiting": [],
            "problems": [],
        }, EXIT_UNKNOWN


def ask(config: Config, request: dict[str, Any]) -> dict[str, Any] | None:
    """Send a request to the daemon and give its answer; None if none runs.

    Raises:
        OSError: one runs and does not answer, or answers that it cannot.
    """
    deadline = time.monotonic() + STARTING_SECONDS
    while config.state_dir.exists() and control_lock.is_held(config.state_dir):
        try:
            answer: dict[str, Any] = socket.ask(config.state_dir, request)
        except (FileNotFoundError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # it is starting, or ending
        else:
            if "error" in answer:
                raise OSError(f"the daemon: {answer['error']}")
            return answer
    return None


def change(config: Config, request: dict[str, Any]) -> "Iterator[list[Result]]":
    """Send a command to the daemon, or perform it if none runs; gives the results part by part.

    Raises:
        OSError: a daemon runs and does not answer, or answers that it cannot; the parts before are done.
        AlreadyRunningError: none ran, and one has just been started.
        CommandError: none runs, and there cannot be such a job, or the database cannot be used.
    """
    for part in _parts(request):
        yield perform(config, part)


def perform(config: Config, request: dict[str, Any]) -> "list[Result]":
    """Send a command to the daemon, or perform it if none runs; gives the results.

    Raises:
        OSError, CommandError: as ``change``.
    """
    answer = ask(config, request) or _perform_here(config, request)
    results: list[Result] = answer["results"]
    return results


def _parts(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a command on many jobs; ``top`` begins with the last, so that the first end up in front."""
    if "jobs" not in request:
        yield request
        return
    left, size = list(request["jobs"]), FIRST_PART
    while left:
        part = slice(-size, None) if request["command"] == "top" else slice(0, size)
        begun = time.monotonic()
        yield request | {"jobs": left[part]}
        del left[part]
        share = PART_SECONDS / max(time.monotonic() - begun, PART_SECONDS / LARGEST_PART)
        size = min(max(int(size * share), 1), LARGEST_PART)


def device_in_use(config: Config) -> str | None:
    """Say why a daemon keeps this process from using the GPU, and what to do; None if none does.

    Raises:
        OSError: a daemon runs and does not answer.
    """
    daemon = ask(config, {"command": "status"})
    if daemon is None:
        return None
    if daemon["daemon"]["paused"] is None:
        return "the daemon may be using the GPU: run framepackd pause first, and resume after it"
    if any(job["state"] == "running" for job in daemon["jobs"]):
        return "the daemon is still in a step and keeps the GPU until its end: try again in a moment"
    return None


def _perform_here(config: Config, request: dict[str, Any]) -> "Answer":
    """Perform a command as the daemon would, under its lock."""
    from framepackd import files, rights
    from framepackd.control import commands
    from framepackd.jobs.store import JobStore

    if not config.database.exists() and "jobs" in request:
        raise CommandError(f"no job {request['jobs'][0]!r}: nothing was ever run on {config.state_dir}")
    files.make_folder(config.jobs_dir, rights.PRIVATE)
    lock = control_lock.Lock(config.state_dir)
    try:
        with rights.own_umask():
            return commands.perform(request, commands.Queue(config, JobStore(config.database)))
    finally:
        lock.release()


def show(config: Config, job: str) -> "tuple[Record | None, bool]":
    """Give the record of a job, None if there is none, and whether a daemon runs that was asked.

    Raises:
        OSError: one runs and does not answer, or answers that it cannot.
        StoreError: none runs, and the database cannot be used.
    """
    answer = ask(config, {"command": "show", "job": job})
    if answer is not None:
        return answer["job"], True
    from framepackd.jobs.described import whole
    from framepackd.jobs.store import JobStore

    found = JobStore(config.database, read_only=True).find(job) if config.database.exists() else None
    return whole(found, config) if found else None, False


def nodes(config: Config) -> "FleetReport | None":
    """Ask the daemon for the other machines; None if none runs.

    Raises:
        OSError: one runs and does not answer, or knows of no other machines.
    """
    return cast("FleetReport | None", ask(config, {"command": "nodes"}))


def _without_daemon(config: Config, state: str, paused: str | None = None) -> "DaemonReport":
    return {
        "state": state,
        "pid": None,
        "since": None,
        "model": None,
        "device": None,
        "hardware": None,
        "paused": paused,
        "inbox": str(config.inbox),
        "outbox": str(config.outbox),
    }


def _take_snapshot(config: Config) -> "tuple[Report, int]":
    """Take the snapshot from the database and the inbox, as no daemon runs."""
    from framepackd import folders
    from framepackd.control.status import snapshot
    from framepackd.inbox.forgotten import forgotten
    from framepackd.inbox.scan import Inbox, Waiting, trouble
    from framepackd.jobs.job import State
    from framepackd.jobs.store import JobStore
    from framepackd.problems import Problem

    store = JobStore(config.database, read_only=True) if config.database.exists() else None
    waiting: tuple[Waiting, ...] = ()
    problems: list[Problem] = []

    try:
        inbox = Inbox(config.inbox, settle_seconds=0, prompted="prompt" in config.defaults)
        scan = inbox.scan(store.taken_as) if store else inbox.scan()
        waiting, problems = scan.waiting, forgotten(scan.parts, config, store)
    except FileNotFoundError:  # a daemon will make it
        pass
    except OSError as error:
        problems = [trouble(config.inbox, error)]
    for key in folders.MARKED:
        if obstacle := folders.trouble(key, config):
            problems.append(Problem(key, f"{key} {obstacle}"))
    left = store.in_state(State.RUNNING) if store else []
    died = any(job.delivery is None for job in left)  # one with a delivery only waits for the outbox
    daemon = _without_daemon(config, "died" if died else "stopped", store.paused() if store else None)
    report = snapshot(store, waiting, daemon, problems, kinds=config.model_kinds())
    return report, EXIT_DIED if died else EXIT_NOT_RUNNING
