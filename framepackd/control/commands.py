"""Performs retry, final, dismiss, cancel, top, move, pause, resume, accept-folders and those on nodes.

The daemon's loop calls this while a daemon runs; else the command does, holding the lock.
"""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar

from framepackd import folders
from framepackd.control import finals, nodes
from framepackd.delivery.deliveries import settle
from framepackd.intake import take_back
from framepackd.jobs import aside
from framepackd.jobs import folder as work_folder
from framepackd.jobs.folder import CHECKPOINT, clear_work_folder
from framepackd.jobs.job import ENDED, Job, State
from framepackd.jobs.job_sql import CANCELLED
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config

if TYPE_CHECKING:
    from framepackd.delivery.deliveries import Deliveries

Made = TypeVar("Made")
ANEW = "retry --anew"
ON_JOBS = ("retry", "final", "dismiss", "cancel", "top", "move")
CHANGING = (*ON_JOBS, "pause", "resume", "accept_folders", *nodes.ON_NODES)
POSSIBLE = {
    "retry": (State.FAILED, State.CANCELLED),
    ANEW: (State.FAILED, State.CANCELLED, State.QUEUED),
    "cancel": (State.QUEUED, State.RUNNING),
    "final": (State.DONE,),
    "top": (State.QUEUED,),
    "move": (State.QUEUED,),
    "dismiss": (State.FAILED,),
}
# What to do instead, where a command can do nothing in a job's state.
ONCE_MORE = {
    State.DONE: "to make it once more, drop its files from the outbox into the inbox",
    State.SKIPPED: 'to make it all the same, set on_duplicate = "run" and drop its files again',
}
INSTEAD = {
    "retry": {
        State.QUEUED: "it runs when its turn comes; framepackd top lets it run next",
        State.RUNNING: "framepackd cancel stops it",
        **ONCE_MORE,
    },
    ANEW: {
        State.RUNNING: "framepackd pause puts it back into the queue: begin it anew then, and resume",
        **ONCE_MORE,
    },
    "cancel": {State.DONE: "its video is in the outbox"},
    "final": dict.fromkeys((State.QUEUED, State.RUNNING), "wait until the draft is made"),
    "top": {State.RUNNING: "there is nothing to move"},
    "dismiss": dict.fromkeys(State, "only failures are put away"),
    "move": {State.RUNNING: "there is nothing to move"},
}
RETRY_FIRST = "framepackd retry puts it into the queue again"


class PassedOver(Protocol):
    """The jobs that the daemon passes over."""

    def forget(self, job_id: str) -> None:
        """Consider a job again."""


class Supervising(Protocol):
    """What the commands need of the part of a daemon that runs the jobs."""

    @property
    def passed_over(self) -> PassedOver:
        """The jobs that the daemon passes over."""

    @property
    def fleet(self) -> nodes.Fleet | None:
        """The other machines; None if none are configured."""

    @property
    def busy(self) -> bool:
        """Whether a job runs."""

    @property
    def helped(self) -> Collection[str]:
        """The ids of the jobs in whose work folders workers still are that only help with them."""

    def runs(self, job_id: str) -> bool:
        """Say whether a job runs."""

    def cancel(self, job_id: str, how: str) -> None:
        """Have a running job stop at its next step, cancelled."""


@dataclass(frozen=True)
class Queue:
    """What the commands work on; ``supervisor`` and ``deliveries`` are a daemon's, None where none runs."""

    config: Config
    store: JobStore
    supervisor: Supervising | None = None
    deliveries: "Deliveries | None" = None

    def at_failed(self, task: Callable[[], Made]) -> Made:
        """Run a task that uses the failed folder, in that folder's thread where there is a daemon.

        Raises:
            OSError: it fails, or takes too long to wait for.
        """
        return task() if self.deliveries is None else self.deliveries.at_failed(task)

    def at_outbox(self, task: Callable[[], Made]) -> Made:
        """Run a task that uses the outbox, as ``at_failed``."""
        return task() if self.deliveries is None else self.deliveries.at("outbox", task)


class Result(TypedDict):
    """What a command did about a job, or about the queue."""

    done: bool
    message: str


Answer = dict[Literal["results"], list[Result]]


def perform(request: dict[str, Any], queue: Queue) -> Answer:
    """Perform a command; one result for each job that it names."""
    store, supervisor = queue.store, queue.supervisor
    command = request["command"]
    if command == "pause":
        store.pause()
        runs = supervisor is not None and supervisor.busy
        then = "the running job stops at its next step and goes on later; " if runs else ""
        return _answer((True, f"paused: {then}framepackd resume goes on"))
    if command == "resume":
        was_paused = store.paused() is not None
        store.resume()
        return _answer((True, "the queue goes on" if was_paused else "the queue was not paused"))
    if command == "accept_folders":
        return _accept_folders(queue)
    if command in nodes.ON_NODES:
        fleet = None if supervisor is None else supervisor.fleet
        at_once = bool(request.get("now"))
        return _answer(
            nodes.perform_on(str(request["host"]), command, queue.config, store, fleet, at_once=at_once)
        )
    # The job that is named first is to be the first of the queue.
    wanted = request["jobs"] if command != "top" else reversed(request["jobs"])
    results = [_perform_on(job, request, queue) for job in wanted]
    return _answer(*(results if command != "top" else reversed(results)))


def _accept_folders(queue: Queue) -> Answer:
    results = []
    for key in ("inbox", *folders.MARKED):
        path = getattr(queue.config, key)
        try:
            folders.accept(key, queue.config)
            results.append((True, f"{key} {path} is accepted"))
        except OSError as error:
            results.append((False, f"{key} {path} cannot be accepted ({error.strerror}): correct its rights"))
    if queue.deliveries is not None:
        queue.deliveries.retry_now()
    return _answer(*results)


def _answer(*results: tuple[bool, str]) -> Answer:
    return {"results": [{"done": done, "message": message} for done, message in results]}


def _perform_on(wanted: str, request: dict[str, Any], queue: Queue) -> tuple[bool, str]:
    command, anew = request["command"], bool(request.get("anew"))
    job, refusal = _choose(ANEW if command == "retry" and anew else command, wanted, queue)
    if job is None:
        return False, refusal
    if command == "top":
        queue.store.move_to_front(job.id)
        return True, f"job {job.id} ({job.path}) runs next"
    if command == "move":
        return _move(job, request.get("before"), queue)
    if command == "final":
        alone = queue.deliveries is None
        return finals.make_final(job, queue.config, queue.store, queue.at_outbox, alone=alone)
    if command == "dismiss":
        queue.store.dismiss(job.id)
        return True, f"job {job.id} ({job.path}) is put away; framepackd retry still runs it again"
    if command == "retry":
        return _retry(job, queue, anew=anew) if job.state in ENDED else _begin_anew(job, queue)
    how = "keep" if request.get("keep") else "discard"
    return _cancel(job, how, queue) if job.delivery is None else _cancel_delivery(job, how, queue)


def _choose(command: str, wanted: str, queue: Queue) -> tuple[Job | None, str]:
    """Find the job that is meant, among those the command can act on; else give None and the reason."""
    found = queue.store.matching(wanted)
    if not found:
        return None, f"no job {wanted!r}: framepackd status lists them"
    possible = POSSIBLE[command]
    if command == ANEW and queue.supervisor is None:
        possible += (State.RUNNING,)  # its daemon died
    fitting = [job for job in found if job.state in possible and _is_free(job, command, queue)]
    if command == "final":
        fitting = [job for job in fitting if job.settings.get("draft")]
        if not fitting and found[0].state == State.DONE:
            return None, f"job {found[0].id} ({found[0].path}) is no draft: it was made with all its steps"
    # Of several results of one name the last is meant; of several jobs in the queue none is guessed.
    by_name = wanted in (fitting[0].name, fitting[0].path) if fitting else False
    if len(fitting) == 1 or (fitting and command in ("retry", "final") and by_name):
        return fitting[0], ""
    if fitting:
        ids = ", ".join(job.id for job in fitting)
        return None, f"{wanted!r} is the name of several jobs ({ids}): give the whole id of one"
    job = found[0]
    if job.delivery is not None:
        reason = f"is being moved, to be {job.delivery['state']}: framepackd status says how that goes"
    else:
        state = State(job.state)
        instead = INSTEAD[command].get(state, RETRY_FIRST)
        reason = f"is {state} and cannot be {_PARTICIPLES[command]}: {instead}"
    return None, f"job {job.id} ({job.path}) {reason}"


_PARTICIPLES = {
    "retry": "tried again",
    ANEW: "begun anew",
    "cancel": "cancelled",
    "final": "made final",
    "top": "moved to the front",
    "move": "moved",
    "dismiss": "dismissed",
}


def _is_free(job: Job, command: str, queue: Queue) -> bool:
    """Say whether a job can be changed: its end is not decided, or its files wait and it is cancelled."""
    if job.delivery is None:
        return True
    moving = queue.deliveries is not None and queue.deliveries.is_moving(job.id)
    return command == "cancel" and not moving and job.delivery["state"] != State.CANCELLED


def _move(job: Job, before: str | None, queue: Queue) -> tuple[bool, str]:
    """Have a job run right before another one, or last if none is named."""
    if not queue.store.move_before(job.id, before):
        return False, f"job {before} is not in the queue any more: {job.path} stays where it is"
    where = f"before {queue.store.get(before).path}" if before else "last"
    return True, f"job {job.id} ({job.path}) runs {where}"


def _begin_anew(job: Job, queue: Queue) -> tuple[bool, str]:
    """Have a queued job start from its beginning when its turn comes."""
    name = f"job {job.id} ({job.path})"
    if job.cancel is not None:
        return False, f"{name} is cancelled, and waits for a daemon to write what exists of its video"
    if _is_helped(job, queue):
        return False, f"{name} cannot be begun anew: another device still leaves it: try again in a moment"
    try:
        kept = aside.give_up(queue.config.jobs_dir / job.id / CHECKPOINT)
    except OSError as error:
        return False, f"{name} cannot be begun anew: {error.filename}: {error.strerror}: correct that first"
    queue.store.begin_anew(job.id)
    if queue.supervisor is not None:
        queue.supervisor.passed_over.forget(job.id)
    then = f"; what was made of it is kept in {kept} until it has ended" if kept else ""
    return True, f"{name} begins anew when its turn comes{then}"


def _retry(job: Job, queue: Queue, *, anew: bool) -> tuple[bool, str]:
    name, config = f"job {job.id} ({job.path})", queue.config
    try:
        obstacle = queue.at_failed(
            lambda: folders.trouble("failed", config) or take_back.obstacle(job, config)
        )
    except OSError as error:
        obstacle, _ = folders.why(error, "failed", config)
    if obstacle is not None:
        return False, f"{name} cannot be tried again: {obstacle}"
    work = config.jobs_dir / job.id
    if work.exists():  # a crash came between the delivery and its removal
        clear_work_folder(work, failed=job.state == State.FAILED)
    if anew:
        try:
            aside.give_up(work / CHECKPOINT)
        except OSError as error:
            return (
                False,
                f"{name} cannot be begun anew: {error.filename}: {error.strerror}: correct that first",
            )
    queue.store.retry(job.id)
    begins = ", and begins anew" if anew else ""
    return _settled(job, f"{name} is in the queue again{begins}", queue)


def _cancel(job: Job, how: str, queue: Queue) -> tuple[bool, str]:
    config, store, supervisor = queue.config, queue.store, queue.supervisor
    name = f"job {job.id} ({job.path})"
    # Where it does not run but its state says so, its daemon died.
    runs = supervisor is not None and supervisor.runs(job.id)
    if not runs and not (config.jobs_dir / job.id / CHECKPOINT).exists():
        how = "discard"
    store.cancel(job.id, how)
    if supervisor is not None:
        supervisor.passed_over.forget(job.id)
    if supervisor is not None and runs:
        supervisor.cancel(job.id, how)
        return True, f"{name} stops at its next step and is then cancelled"
    if how == "keep":
        return True, f"{name} is cancelled as soon as a daemon has written what exists of its video"
    store.decide(job.id, State.CANCELLED, error=CANCELLED["error"])
    return _settled(job, f"{name} is cancelled", queue)


def _cancel_delivery(job: Job, how: str, queue: Queue) -> tuple[bool, str]:
    """Cancel a job whose delivery cannot be made."""
    if not queue.store.cancel_delivery(job.id, how):
        return False, f"job {job.id} ({job.path}) has ended meanwhile: framepackd show tells how"
    return _settled(job, f"job {job.id} ({job.path}) is cancelled", queue)


def _is_helped(job: Job, queue: Queue) -> bool:
    """Say whether a worker that makes a clip of a job has not left it yet."""
    return queue.supervisor is not None and job.id in queue.supervisor.helped


def _settled(job: Job, message: str, queue: Queue) -> tuple[bool, str]:
    if _is_helped(job, queue):  # then the daemon moves its files
        return True, f"{message}, as soon as another device has left it"
    try:
        after = _settle(job, queue)
    except OSError as error:
        reason, _ = folders.why(error, "failed", queue.config)
        return True, f"{message}, as soon as they can be moved ({reason})"
    if after.delivery is not None and after.delivery["state"] == State.FAILED:
        if queue.deliveries is None:  # else the daemon moves its files in its next round
            with contextlib.suppress(OSError):  # then a daemon tries it again
                _settle(job, queue)
        return False, f"job {job.id} ({job.path}) fails again: {after.delivery['error']}"
    if after.state == State.CANCELLED:
        folder, _ = work_folder.where(after)
        message += f": its files are in {queue.config.failed / folder}"
    return True, message


def _settle(job: Job, queue: Queue) -> Job:
    """Move the files of a job as is decided; gives what it is then.

    Raises:
        OSError: they cannot be moved now.
    """
    decided = queue.store.get(job.id)
    queue.at_failed(partial(settle, decided, queue.config, queue.store, take_back.bring_back))
    return queue.store.get(job.id)
