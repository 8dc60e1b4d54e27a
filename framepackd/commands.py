"""What people tell a queue: retry, cancel, top, pause, resume.

The daemon's loop does it while one runs; else the command itself, which then holds the lock.
"""

from typing import TYPE_CHECKING, Any

from framepackd import delivery, retry
from framepackd.config import Config
from framepackd.database import Job, State
from framepackd.intake import CHECKPOINT, clear_work_folder
from framepackd.jobs import CANCELLED, JobStore

if TYPE_CHECKING:
    from framepackd.runner import Runner

CHANGING = ("retry", "cancel", "top", "pause", "resume")
POSSIBLE = {
    "retry": (State.FAILED, State.CANCELLED),
    "cancel": (State.QUEUED, State.RUNNING),
    "top": (State.QUEUED,),
}
# Where a command cannot do anything: what can be done instead.
INSTEAD = {
    "retry": {
        State.QUEUED: "it runs when its turn comes; framepackd top lets it run next",
        State.RUNNING: "framepackd cancel stops it",
        State.DONE: "to make it once more, drop its files from the outbox into the inbox",
        State.SKIPPED: 'to make it all the same, set on_duplicate = "run" and drop its files again',
    },
    "cancel": {State.DONE: "its video is in the outbox"},
    "top": {State.RUNNING: "there is nothing to move"},
}
RETRY_FIRST = "framepackd retry puts it into the queue again"


def perform(
    request: dict[str, Any], config: Config, store: JobStore, runner: "Runner | None"
) -> dict[str, Any]:
    """Do what is asked, ``runner`` being None where no daemon runs.

    Answers ``results``: for each job asked for whether it was done, and a line that says what.
    """
    command = request["command"]
    if command == "pause":
        store.pause()
        then = "the running job stops at its next step and goes on later; " if runner and runner.busy else ""
        return _answer((True, f"paused: {then}framepackd resume goes on"))
    if command == "resume":
        was_paused = store.paused() is not None
        store.resume()
        return _answer((True, "the queue goes on" if was_paused else "the queue was not paused"))
    # The first named shall be the first in the queue.
    wanted = request["jobs"] if command != "top" else reversed(request["jobs"])
    results = [_perform_on(job, request, config, store, runner) for job in wanted]
    return _answer(*(results if command != "top" else reversed(results)))


def settle(job: Job, config: Config, store: JobStore) -> None:
    """Move the files of a job to where it is decided that they belong.

    Raises:
        OSError: that cannot be done now; nothing is lost, try again later.
    """
    assert job.delivery is not None
    if job.delivery["state"] == State.QUEUED:
        retry.bring_back(job, config, store)
    else:
        delivery.deliver(job, config, store)


def _answer(*results: tuple[bool, str]) -> dict[str, Any]:
    return {"results": [{"done": done, "message": message} for done, message in results]}


def _perform_on(
    wanted: str, request: dict[str, Any], config: Config, store: JobStore, runner: "Runner | None"
) -> tuple[bool, str]:
    command = request["command"]
    job, refusal = _choose(command, wanted, store)
    if job is None:
        return False, refusal
    if command == "top":
        store.move_to_front(job.id)
        return True, f"job {job.id} ({job.path}) runs next"
    if command == "retry":
        return _retry(job, config, store)
    how = "keep" if request.get("keep") else "discard"
    return _cancel(job, how, config, store, runner)


def _choose(command: str, wanted: str, store: JobStore) -> tuple[Job | None, str]:
    """Find the job that is meant among those the command can do something with, or say why there is none."""
    found = store.matching(wanted)
    if not found:
        return None, f"no job {wanted!r}: framepackd status lists them"
    fitting = [job for job in found if job.state in POSSIBLE[command] and job.delivery is None]
    # Of several results of one name the last is meant; of several in the queue it cannot be told which.
    by_name = wanted in (fitting[0].name, fitting[0].path) if fitting else False
    if len(fitting) == 1 or (fitting and command == "retry" and by_name):
        return fitting[0], ""
    if fitting:
        ids = ", ".join(job.id for job in fitting)
        return None, f"{wanted!r} is the name of several jobs ({ids}): give the whole id of one"
    job = found[0]
    if job.delivery is not None:
        reason = f"is being moved, to be {job.delivery['state']}: try again when framepackd status says so"
    else:
        state = State(job.state)
        instead = INSTEAD[command].get(state, RETRY_FIRST)
        reason = f"is {state} and cannot be {_PARTICIPLES[command]}: {instead}"
    return None, f"job {job.id} ({job.path}) {reason}"


_PARTICIPLES = {"retry": "tried again", "cancel": "cancelled", "top": "moved to the front"}


def _retry(job: Job, config: Config, store: JobStore) -> tuple[bool, str]:
    name = f"job {job.id} ({job.path})"
    try:
        obstacle = retry.obstacle(job, config)
    except OSError as error:
        obstacle = f"{error.filename} cannot be read ({error.strerror}): correct its permissions"
    if obstacle is not None:
        return False, f"{name} cannot be tried again: {obstacle}"
    work = config.jobs_dir / job.id
    if work.exists():  # its files had been delivered, and a crash came before it was removed
        clear_work_folder(work, State(job.state))
    store.retry(job.id)
    return _settled(job, f"{name} is in the queue again", config, store)


def _cancel(job: Job, how: str, config: Config, store: JobStore, runner: "Runner | None") -> tuple[bool, str]:
    name = f"job {job.id} ({job.path})"
    runs = runner is not None and runner.runs(job.id)  # else its daemon is dead, whatever its state says
    if not runs and not (config.jobs_dir / job.id / CHECKPOINT).exists():
        how = "discard"
    store.cancel(job.id, how)
    if runner is not None and runs:
        runner.cancel(how)
        return True, f"{name} stops at its next step and is then cancelled"
    if how == "keep":
        return True, f"{name} is cancelled as soon as a daemon has written what exists of its video"
    store.decide(job.id, State.CANCELLED, error=CANCELLED["error"])
    return _settled(job, f"{name} is cancelled: its files are in {config.failed / job.folder}", config, store)


def _settled(job: Job, message: str, config: Config, store: JobStore) -> tuple[bool, str]:
    try:
        settle(store.get(job.id), config, store)
    except OSError as error:
        where = error.filename2 or error.filename
        return True, f"{message}, as soon as they can be moved ({error.strerror}: {where})"
    after = store.get(job.id)
    if after.delivery is not None and after.delivery["state"] == State.FAILED:
        return False, f"job {job.id} ({job.path}) fails again: {after.delivery['error']}"
    return True, message
