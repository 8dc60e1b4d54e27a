"""The commands' side: ask the daemon or, where none runs, do it ourselves.

Imports stand where they are needed: a command answers in half a second.
"""

import os
import time
from typing import Any

from framepackd import control
from framepackd.config import Config

EXIT_DIED, EXIT_NOT_RUNNING, EXIT_UNKNOWN = 1, 3, 4  # of status, as service managers have it
STARTING_SECONDS = 3.0


def report(config: Config) -> tuple[dict[str, Any], int]:
    """Ask the daemon what is going on or, where none runs, look ourselves; with the exit code."""
    stopped: dict[str, Any] = dict.fromkeys(("pid", "since", "model", "device", "hardware", "paused"))
    try:
        answer = ask(config, {"command": "status"})
        return (answer, 0) if answer is not None else _look(config, stopped)
    except Exception as error:  # whatever it is: it cannot be told
        daemon = {**stopped, "state": "unknown", "error": f"cannot tell: {config.state_dir}: {error}"}
        nothing: dict[str, Any] = {"eta_seconds": None, "jobs": [], "waiting": [], "problems": []}
        return {"daemon": daemon, "counts": {}, **nothing}, EXIT_UNKNOWN


def ask(config: Config, request: dict[str, Any]) -> dict[str, Any] | None:
    """Ask the daemon; None if none runs.

    Raises:
        OSError: one runs and does not answer, or answers that it cannot.
    """
    deadline = time.monotonic() + STARTING_SECONDS
    while config.state_dir.exists() and control.is_held(config.state_dir):
        try:
            answer: dict[str, Any] = control.ask(config.state_dir, request)
        except (FileNotFoundError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # it is just starting, or just ending
        else:
            if "error" in answer:
                raise OSError(f"the daemon: {answer['error']}")
            return answer
    return None


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
    from framepackd import commands, files, rights
    from framepackd.jobs import JobStore

    if not config.database.exists() and "jobs" in request:
        raise LookupError(f"no job {request['jobs'][0]!r}: nothing was ever run on {config.state_dir}")
    files.make_folder(config.jobs_dir, rights.PRIVATE)
    lock = control.Lock(config.state_dir)
    before = os.umask(rights.UMASK)
    try:
        return commands.perform(request, commands.Queue(config, JobStore(config.database)))
    finally:
        os.umask(before)
        lock.release()


def find(config: Config, job: str) -> dict[str, Any] | None:
    """Give the record of a job, where no daemon runs; None if there is none."""
    from framepackd.jobs import JobStore
    from framepackd.status import whole

    found = JobStore(config.database, read_only=True).find(job) if config.database.exists() else None
    return whole(found, config) if found else None


def _look(config: Config, stopped: dict[str, Any]) -> tuple[dict[str, Any], int]:
    from framepackd import folders
    from framepackd.database import State
    from framepackd.forgotten import forgotten
    from framepackd.inbox import Inbox, Waiting, trouble
    from framepackd.jobs import JobStore
    from framepackd.problems import Problem
    from framepackd.status import snapshot

    store = JobStore(config.database, read_only=True) if config.database.exists() else None
    waiting: tuple[Waiting, ...] = ()
    problems: list[Problem] = []

    def missed_job(folder: str, name: str) -> str | None:
        job = store.latest(folder, name) if store else None
        return job.id if job else None

    try:
        inbox = Inbox(config.inbox, settle_seconds=0, prompted="prompt" in config.defaults)
        scan = inbox.scan(missed_job)
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
    state = {"state": "died" if died else "stopped", "paused": store.paused() if store else None}
    report = snapshot(store, waiting, {**stopped, **state}, problems)
    return report, EXIT_DIED if died else EXIT_NOT_RUNNING
