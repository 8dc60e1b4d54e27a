"""Sends a command to the daemon or, where none runs, performs it.

Imports stand where they are needed: a command answers in half a second.
"""

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from framepackd.control import socket
from framepackd.jobs import lock as control_lock
from framepackd.settings.config import Config

if TYPE_CHECKING:
    from framepackd.jobs.report import DaemonReport, Record, Report

EXIT_DIED, EXIT_NOT_RUNNING, EXIT_UNKNOWN = 1, 3, 4  # of status, as service managers have it
STARTING_SECONDS = 3.0
PART_SECONDS = 1.0  # of many jobs so many are asked for at once as this takes: the loop hears others between
FIRST_PART, LARGEST_PART = 10, 100  # jobs


def report(config: Config) -> "tuple[Report, int]":
    """Ask the daemon for its snapshot, or take one where none runs; with the exit code of ``status``."""
    try:
        answer = ask(config, {"command": "status"})
        return (cast("Report", answer), 0) if answer is not None else _look(config)
    except Exception as error:  # whatever it is: nothing is known
        daemon = _without_daemon("unknown")
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
    """Ask the daemon; None if none runs.

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
            time.sleep(0.05)  # it is just starting, or just ending
        else:
            if "error" in answer:
                raise OSError(f"the daemon: {answer['error']}")
            return answer
    return None


def change(config: Config, request: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Have the daemon do it or, where none runs, do it ourselves; gives the results part by part.

    Raises:
        OSError: one runs and does not answer, or answers that it cannot; what was given before is done.
        AlreadyRunningError, LookupError, StoreError: as ``do_without_daemon``.
    """
    for part in _parts(request):
        answer = ask(config, part) or do_without_daemon(config, part)
        yield answer["results"]


def _parts(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ask for many jobs in parts; the first that are to go to the top come last."""
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
    """Say why the GPU may not be used beside a daemon, and what to do; None if it may.

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


def do_without_daemon(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Do what the daemon would, where none runs.

    Raises:
        AlreadyRunningError: one has just been started.
        LookupError: there cannot be such a job.
        StoreError, OSError: the database or a folder cannot be used.
    """
    from framepackd import files, rights
    from framepackd.control import commands
    from framepackd.jobs.store import JobStore

    if not config.database.exists() and "jobs" in request:
        raise LookupError(f"no job {request['jobs'][0]!r}: nothing was ever run on {config.state_dir}")
    files.make_folder(config.jobs_dir, rights.PRIVATE)
    lock = control_lock.Lock(config.state_dir)
    before = os.umask(rights.UMASK)
    try:
        return commands.perform(request, commands.Queue(config, JobStore(config.database)))
    finally:
        os.umask(before)
        lock.release()


def find(config: Config, job: str) -> "Record | None":
    """Give the record of a job, where no daemon runs; None if there is none."""
    from framepackd.jobs.described import whole
    from framepackd.jobs.store import JobStore

    found = JobStore(config.database, read_only=True).find(job) if config.database.exists() else None
    return whole(found, config) if found else None


def _without_daemon(state: str, paused: str | None = None) -> "DaemonReport":
    return {
        "state": state,
        "pid": None,
        "since": None,
        "model": None,
        "device": None,
        "hardware": None,
        "paused": paused,
    }


def _look(config: Config) -> "tuple[Report, int]":
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
    except FileNotFoundError:  # a daemon makes it
        pass
    except OSError as error:
        problems = [trouble(config.inbox, error)]
    for key in folders.MARKED:
        if obstacle := folders.trouble(key, config):
            problems.append(Problem(key, f"{key} {obstacle}"))
    left = store.in_state(State.RUNNING) if store else []
    died = any(job.delivery is None for job in left)  # one with a delivery waits for the outbox, no more
    daemon = _without_daemon("died" if died else "stopped", store.paused() if store else None)
    return snapshot(store, waiting, daemon, problems), EXIT_DIED if died else EXIT_NOT_RUNNING
