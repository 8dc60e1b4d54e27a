"""framepackd notify: runs a command and calls a webhook when jobs end, in a process of its own.

It only reads the job store: whatever hangs or fails here, no video waits for it, and the daemon needs no
network. ``notify/`` in the state folder records which events it has reported. Each end of a job is reported
at least once, and again only if this process is killed meanwhile. Jobs that ended before its first start, or
before a command or webhook was configured, are not reported.
"""

import json
import logging
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import func, select

from framepack_core import __version__
from framepackd import files, rights
from framepackd.apart import Apart
from framepackd.jobs import lock as control_lock
from framepackd.jobs.database import StoreError
from framepackd.jobs.described import whole
from framepackd.jobs.job import ENDED, Job, State
from framepackd.jobs.report import Record
from framepackd.jobs.store import JobStore
from framepackd.problems import CommandError
from framepackd.settings.config import Config
from framepackd.settings.tables import NotifyConfig

log = logging.getLogger(__name__)

FOLDER = "notify"  # in the state folder
POLL_SECONDS = 1.0
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 1.0, 300.0  # before the second attempt, doubled each time
LOOK_SECONDS = 0.1  # between two checks whether a running command or post is to stop

QUEUE_EMPTY = "queue_empty"


class NotifyError(CommandError):
    """Nothing can be reported; the text says why and what to do."""

    exit_code = 2


class _FailedError(Exception):
    """This attempt to report an event failed."""


@dataclass(frozen=True)
class Event:
    """An end of a job, or of all of them."""

    event: str
    job: Record | None  # whole, as `framepackd show --json` has it; None: the queue is empty

    def variables(self) -> dict[str, str]:
        """Give the environment variables of a command."""
        job = self.job or {}
        told = {
            "event": self.event,
            "job": job.get("id"),
            "name": "/".join(filter(None, (job.get("folder"), job.get("name")))),
        }
        told |= {"output": job.get("output"), "error": job.get("error")}
        # No environment holds a zero byte.
        return {f"FRAMEPACKD_{key.upper()}": (value or "").replace("\0", "") for key, value in told.items()}

    def to_json(self) -> bytes:
        """Give the body of a webhook's request."""
        return json.dumps({"event": self.event, "job": self.job}, ensure_ascii=False).encode()


Tell = Callable[[Event, threading.Event], None]  # raises _FailedError


def run(config: Config) -> None:
    """Report the configured events until SIGTERM or Ctrl-C.

    Raises:
        NotifyError: neither command nor webhook is set, or the record cannot be read.
        SecretError: the webhook's address cannot be read.
        AlreadyRunningError: another process reports for this state folder.
        OSError: the state folder cannot be written.
    """
    told = config.notify.model_copy(update={"webhook": config.notify.read_webhook(), "webhook_file": None})
    tells: dict[str, Tell] = {}
    if told.command:
        tells["command"] = lambda event, stop: run_command(told, event, stop)
    if told.webhook is not None:
        tells["webhook"] = lambda event, stop: call_webhook(told, event, stop)
    if not tells:
        raise NotifyError("nothing to run or call: set command or webhook under [notify] in the config")
    folder = config.state_dir / FOLDER
    files.make_folder(folder, rights.PRIVATE)
    lock = control_lock.Lock(folder)
    try:
        for name in {"command", "webhook"} - set(tells):
            (folder / f"{name}.json").unlink(missing_ok=True)  # configured again, it starts anew
        with _stopped_by_signals() as stop:
            followers = [
                Follower(config, folder / f"{name}.json", tell, stop) for name, tell in tells.items()
            ]
            log.info("telling %s of %s", " and ".join(tells), ", ".join(told.events))
            with ThreadPoolExecutor(len(followers)) as threads:
                running = [threads.submit(follower.run) for follower in followers]
                wait(running, return_when=FIRST_EXCEPTION)
                stop.set()  # one that failed takes the other with it: systemd starts both again
            for ended in running:
                ended.result()
    finally:
        lock.release()


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Follower:
    """Follows the job store for a command or a webhook, and records durably what was reported."""

    def __init__(self, config: Config, memory: Path, tell: Tell, stop: threading.Event) -> None:
        """Resume where the last one stopped.

        Raises:
            NotifyError: the record cannot be read.
        """
        self._config = config
        self._memory = memory
        self._tell = tell
        self._stop = stop
        self._seen: object = None  # the database's files at the last look
        self._trouble = ""
        self._told: dict[str, int] | None = None  # None: there was no look yet
        self._busy = False  # a job has ended since queue_empty was last reported
        if memory.exists():
            try:
                recorded = json.loads(memory.read_text())
                self._told, self._busy = dict(recorded["told"]), bool(recorded["busy"])
            except (ValueError, KeyError, TypeError) as error:
                raise NotifyError(
                    f"{memory} is damaged ({error!r}): remove it; jobs that ended by then are not reported"
                ) from error

    def run(self) -> None:
        """Look and report until stopped."""
        while not self._stop.is_set():
            try:
                self.look()
            except (StoreError, OSError) as error:  # the daemon logs the same
                if str(error) != self._trouble:
                    log.warning("the jobs cannot be read: %s", error)
                self._trouble, self._seen = str(error), None
            else:
                self._trouble = ""
            self._stop.wait(POLL_SECONDS)

    def look(self) -> None:
        """Report what has ended since the last look.

        Raises:
            StoreError: the database cannot be read.
            OSError: the record cannot be written.
        """
        signature = _signature(self._config.database)
        if signature == self._seen and self._told is not None:
            return
        # Opened each time: a database that an update has yet to migrate is read as a copy.
        store = JobStore(self._config.database, read_only=True) if self._config.database.exists() else None
        ends = _ends(store) if store else {}
        if self._told is None:
            self._record(ends, busy=False)
        elif store:
            self._tell_ends(store, ends, self._told)
        if not self._stop.is_set():
            self._seen = signature

    def _tell_ends(self, store: JobStore, ends: dict[str, int], told: dict[str, int]) -> None:
        fresh = [store.get(job_id) for job_id, entries in ends.items() if told.get(job_id) != entries]
        for job in sorted(fresh, key=lambda job: (job.finished_at or "", job.seq)):
            if not self._deliver(Event(_event_of(job), whole(job, self._config))):
                return
            told = {**told, job.id: ends[job.id]}
            self._record(told, busy=True)
        counts = store.counts()
        if self._busy and not counts[State.QUEUED] and not counts[State.RUNNING]:
            if not self._deliver(Event(QUEUE_EMPTY, None)):
                return
            self._record(told, busy=False)

    def _record(self, told: dict[str, int], *, busy: bool) -> None:
        files.write_text(self._memory, json.dumps({"told": told, "busy": busy}))
        self._told, self._busy = told, busy

    def _deliver(self, event: Event) -> bool:
        """Report one event, with the configured attempts; false if stopped before that was over."""
        settings = self._config.notify
        what = f"{event.event} {event.job['id'] if event.job else ''}".strip()
        if event.event not in settings.events:
            return True
        pause = BACKOFF_SECONDS
        for attempt in range(1, settings.attempts + 1):
            try:
                self._tell(event, self._stop)
            except _FailedError as error:
                then = f"tried again in {pause:.0f} s" if attempt < settings.attempts else "given up"
                log.warning("%s: %s: %s (attempt %d): %s", self._memory.stem, what, error, attempt, then)
            else:
                log.info("%s: told %s", self._memory.stem, what)
                return True
            if self._stop.is_set() or (attempt < settings.attempts and self._stop.wait(pause)):
                return False
            pause = min(2 * pause, LONGEST_BACKOFF_SECONDS)
        return True


def _signature(database: Path) -> list[tuple[int, int, int] | None]:
    """Give inode, size and mtime of the database's files: they change with every transaction."""
    found: list[tuple[int, int, int] | None] = []
    for path in (database, database.with_name(f"{database.name}-wal")):
        try:
            status = path.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _ends(store: JobStore) -> dict[str, int]:
    """Give, by id, how many entries the history of each ended job has: more after each end."""
    entries = select(Job.id, func.json_array_length(Job.history)).where(Job.state.in_(ENDED))
    with store.looking() as session:
        return {row[0]: row[1] for row in session.execute(entries)}


def _event_of(job: Job) -> str:
    return str(State(job.state).value)


def run_command(settings: NotifyConfig, event: Event, stop: threading.Event) -> None:
    """Run the command, with no shell between."""
    try:
        process = subprocess.Popen(  # noqa: S603 - the configuration's own command
            settings.command,
            stdin=subprocess.PIPE,
            env=os.environ | event.variables(),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise _FailedError(f"{settings.command[0]} cannot be run: {error}") from error
    deadline = time.monotonic() + settings.timeout_seconds
    rest: bytes | None = event.to_json()
    while True:
        try:
            process.communicate(rest, timeout=LOOK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            rest = None  # communicate() goes on sending the first
            if stop.is_set() or time.monotonic() > deadline:
                with suppress(ProcessLookupError):  # it has ended just now
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                why = "stopped" if stop.is_set() else f"took more than {settings.timeout_seconds:g} s"
                raise _FailedError(f"{settings.command[0]} {why}") from None
    if process.returncode != 0:
        raise _FailedError(f"{settings.command[0]} ended with {process.returncode}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would follow with a GET, without the event."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nowhere."""


def call_webhook(settings: NotifyConfig, event: Event, stop: threading.Event) -> None:
    """Post the event to the webhook; waits no longer than configured, whatever the server does."""
    assert settings.webhook is not None
    host = urlsplit(settings.webhook).hostname  # paths of webhooks are secrets
    headers = {"Content-Type": "application/json", "User-Agent": f"framepackd/{__version__}"}
    request = urllib.request.Request(settings.webhook, event.to_json(), headers)  # noqa: S310 - http(s) only
    slow = f"no answer within {settings.timeout_seconds:g} s"

    def post() -> None:
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            opener.open(request, timeout=settings.timeout_seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
            redirects = ", a redirect: set webhook to that address" if 300 <= error.code < 400 else ""
            raise _FailedError(f"{host}: answered {error.code}{redirects}") from error
        except Exception as error:  # of the socket, of TLS, of HTTP: this attempt failed
            late = isinstance(getattr(error, "reason", error), TimeoutError)  # URLError may wrap it
            why = slow if late else str(error) or type(error).__name__
            raise _FailedError(f"{host}: {why}") from error

    # A server that answers a byte at a time would outlast any timeout of the socket.
    posting: Apart[None] = Apart("webhook", lambda: None)
    posting.begin(post)
    deadline = time.monotonic() + settings.timeout_seconds
    while not posting.is_done(LOOK_SECONDS):
        if stop.is_set() or time.monotonic() > deadline:
            raise _FailedError(f"{host}: {'stopped' if stop.is_set() else slow}")
    posting.take()
