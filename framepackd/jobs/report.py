"""The types of ``status --json`` and ``nodes --json``, which terminal, page, metrics and systemd draw.

Times are UTC in ISO 8601, to the second. A daemon of an older version, which may still run after an update,
leaves out keys that came later: readers ask for those with ``get``.
"""

from typing import Any, NotRequired, TypedDict

from framepackd.jobs.job import State


class DeliveryReport(TypedDict):
    """How the files of a job stand whose end is decided."""

    state: str  # what the job is to become
    reason: str | None  # why its files cannot be moved
    next_try: str | None
    bytes_moved: int | None
    bytes: int | None


class FactsReport(TypedDict):
    """What a person knows a job by, and when it is made."""

    prompt: str | None
    width: int
    height: int
    seconds: float | None  # of the video
    seed: int | None
    model: str | None
    draft: bool
    final: str | None  # of a draft: the job that makes its final, if that was asked for
    kind: str | None  # framepack or f1
    device: str | None
    step_seconds: float | None
    decode_seconds: float | None  # of one section
    saved_sections: int  # decoded, of a job that has not ended
    thumb: str | None  # the file of the picture that it begins with
    code: str | None  # of a failure: memory, settings, prompt, picture, model or other
    remedy: str | None
    starts_at: str | None  # at its place in the queue
    ends_at: str | None


class JobReport(FactsReport):
    """One job of the queue, or one that has ended."""

    id: str
    name: str
    folder: str
    state: str
    attempts: int
    resumes: int
    section: int
    sections: int
    clips: int
    step: int
    steps: int
    frames: int
    progress: float | None  # 0 to 1
    stage: list[str]
    eta_seconds: float | None
    finishes_at: str | None  # eta_seconds from now
    error: str | None
    output: str | None
    quality: str | None
    warnings: list[str]
    note: str | None  # what a person should know of a job that is not done
    delivery: DeliveryReport | None
    finished_at: str | None
    open: bool  # it failed, and nobody has retried it, dropped its files again or dismissed it


class WaitingReport(TypedDict):
    """Files in the inbox that are not a job yet."""

    name: str
    folder: str
    files: list[str]
    missing: str  # the file that is missing, or what is in the way
    note: str  # the same in words
    reason: str  # the same as a code: no_prompt, no_picture, gap, several or other
    since: str


class ProblemReport(TypedDict):
    """Something that a person should put right: a fixed word for programs, and a text."""

    code: str
    text: str


class DeviceReport(TypedDict):
    """A device that computes one job at a time."""

    name: str  # as in the configuration; "auto" until a worker has chosen
    card: str | None  # with its driver, in words, once a worker has reported it
    job: str | None  # the id of the one that runs
    finishing: NotRequired[str | None]  # the id of the one whose video is written, perhaps beside another
    helps: NotRequired[str | None]  # the id of one that another device computes, and of which it makes clips
    held: str | None  # why none is started


class CardReport(TypedDict):
    """A card of another machine; what it has said of itself is None until it is reached."""

    name: str  # HOST:DEVICE
    card: str | None  # its name
    hardware: str | None  # with its driver, in words
    versions: dict[str, str] | None
    models: list[str] | None  # whose files are there
    greeted: str | None  # when it said so
    job: str | None  # the id of the one that runs
    held: str | None  # why it gets none
    asked: bool  # it will say in a moment what it has


class NodeReport(TypedDict):
    """Another machine that computes."""

    name: str
    address: str | None
    reachable: bool
    why: str | None  # it is not
    drained: str | None  # since when it gets no jobs
    last_sign: str | None  # when it answered last, since the daemon started
    cards: list[CardReport]


class FleetReport(TypedDict):
    """The other machines, as ``nodes --json`` prints them."""

    trouble: str | None  # why nothing is known of them
    nodes: list[NodeReport]


class DaemonReport(TypedDict):
    """The daemon; where none runs, ``state`` says so and most else is None."""

    state: str  # running, stopping, stopped, died or unknown
    pid: int | None
    since: str | None
    model: str | None
    device: str | None  # all of them, joined
    hardware: str | None
    devices: NotRequired[list[DeviceReport]]
    paused: str | None  # why no job is started
    inbox: NotRequired[str]
    outbox: NotRequired[str]
    error: NotRequired[str]  # why nothing is known


class Report(TypedDict):
    """The whole snapshot."""

    daemon: DaemonReport
    counts: dict[str, int]  # jobs by state, and groups of files that wait
    eta_seconds: float | None  # until the queue is done
    finishes_at: str | None
    jobs: list[JobReport]  # those that run, the queue in its order, the last results
    waiting: list[WaitingReport]
    problems: list[ProblemReport]


Record = dict[str, Any]  # one job whole, as ``show --json`` prints it


def at_work(daemon: DaemonReport) -> int:
    """Count the devices that share the queue: not those that are held, of which at least one counts."""
    devices = daemon.get("devices", ())
    return max(sum(device["held"] is None or device["job"] is not None for device in devices), 1)


def running_in(report: Report) -> list[JobReport]:
    """Give the jobs that are being generated; not those whose files are still to be moved."""
    return [job for job in report["jobs"] if job["state"] == State.RUNNING and not job["delivery"]]
