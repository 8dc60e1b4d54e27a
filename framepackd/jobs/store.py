"""The queue of jobs: each change of state, each counted attempt is one statement in one transaction.

Only the holder of the state folder's lock writes: the daemon, or a command while no daemon runs. A recorded
cancellation wins: however the job ends or is interrupted, it ends cancelled and is never generated again.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import case, delete, false, func, select, update
from sqlalchemy.orm import Session

from framepackd.jobs.database import StoreError, open_database
from framepackd.jobs.job import ENDED, Job, Meta, State, utc_now
from framepackd.jobs.job_sql import (
    CANCELLED,
    IN_ORDER,
    RUNNABLE,
    as_json,
    entry,
    following,
    naming_its_final,
    smoothed,
    unless_cancelled,
    with_entry,
)
from framepackd.jobs.job_warnings import CutPrompt
from framepackd.jobs.notes import Notes
from framepackd.jobs.step_reports import StepReports

STALLED_DEATHS = 5  # daemons that died in a row under a job that finished no step
PAUSED = "paused"  # in the table meta: since when


class JobStore(Notes):
    """The queue. Threads may share it: each call has a connection and a transaction of its own."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the database, and create it if it is not there.

        Raises:
            StoreError: it is damaged, another program's, of a newer version, or cannot be opened.
        """
        engine = open_database(path, read_only=read_only)
        # Readers wait for nobody, and still read when nothing can be written.
        super().__init__(path, engine if read_only else open_database(path, read_only=True), engine)
        # While one connection stays open, the end of another does not copy SQLite's log into the database,
        # and sync that too: a call takes a third of the time.
        self._open = None if read_only else engine.raw_connection()
        self._steps = StepReports()
        self.changes = 0  # made since: as long as it stays, so does what a query finds

    def close(self) -> None:
        """Have SQLite copy its log into the database, as far as nobody else has it open."""
        if self._open is not None:
            self._open.close()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with super()._session() as session:
            reported = self._steps.write(session)
            yield session
        self._steps.forget(reported)
        self.changes += 1

    def _change(self, statement: Any) -> bool:
        """Execute one statement in a transaction; says whether it changed a row."""
        with self._session() as session:
            return _changed(session, statement)

    # intake

    def add(self, job: Job) -> Job:
        """Record a new job, at the back of the queue."""
        with self._session() as session:
            job.position = 1 + (session.scalar(select(func.max(Job.position))) or 0)
            job.history = [entry(State(job.state), "taken in")]
            session.add(job)
            if draft := ((job.settings or {}).get("draft_of") or {}).get("id"):
                session.execute(naming_its_final(draft, job.id))
        return job

    # a job's life

    def claim(self, job_id: str | None = None) -> Job | None:
        """Start a queued job, by default the next one; None if it cannot run any more."""
        chosen = Job.id == job_id if job_id else Job.seq == following(Job.seq).scalar_subquery()
        statement = (
            update(Job)
            .where(chosen, *RUNNABLE)
            .values(
                state=State.RUNNING,
                resumes=Job.resumes + func.iif(Job.started_at.is_(None), 0, 1),
                started_at=func.coalesce(Job.started_at, utc_now()),
                history=with_entry(State.RUNNING, "started"),
            )
            .returning(Job)
        )
        with self._session() as session:
            return session.scalars(statement).one_or_none()

    def resumed(self, job_id: str, *, steps: int, beyond: int = 0) -> None:
        """Record how many steps of a job were done already when it started, in order and ``beyond`` these."""
        job = self.get(job_id)
        recorded = max(job.section - 1, 0) * job.steps + job.step + job.steps_beyond
        section = (steps - 1) // job.steps + 1 if steps else 0
        self._set_running(
            job_id,
            section=section,
            step=steps - max(section - 1, 0) * job.steps,
            steps_beyond=beyond,
            # A crash may fall between checkpoint and report: count that step now.
            steps_run=Job.steps_run + max(steps + beyond - recorded, 0),
        )

    def note(self, job_id: str, note: str) -> None:
        """Add a note for people to the history of a running job."""
        self._set_running(job_id, history=with_entry(State.RUNNING, note))

    def cut(self, job_id: str, cuts: list[CutPrompt]) -> None:
        """Record which prompts of a running job are too long."""
        self._set_running(job_id, cuts=cuts)

    def step(self, job_id: str, *, section: int, step: int, seconds: float, beyond: int = 0) -> None:
        """Record a finished sampling step; ``section`` counts from 1, ``beyond`` as in :class:`Job`."""
        self._steps.add(job_id, section, step, seconds, beyond)
        if not self._steps.held:
            self._record_steps()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Record the steps of the block in one transaction: at its end, or before the next other change."""
        self._steps.held = True
        try:
            yield
        finally:
            self._steps.held = False
        self._record_steps()

    def _record_steps(self) -> None:
        if self._steps.waiting:
            with self._session():
                pass  # each transaction writes them first

    def step_beyond(self, job_id: str, *, seconds: float) -> None:
        """Record a step that another device has done of a clip of the job."""
        beyond, run = Job.steps_beyond + 1, Job.steps_run + 1
        taken = smoothed(Job.step_seconds, seconds)
        self._set_running(job_id, steps_beyond=beyond, steps_run=run, step_seconds=taken)

    def decoded(self, job_id: str, *, section: int, seconds: float) -> None:
        """Record that a section, counted from 1, is decoded: the job is at the start of the next one, if any.

        ``decode_seconds`` is the mean of all, for the first sections of a video differ from the others.
        """
        is_last = Job.sections <= section
        mean = Job.decode_seconds + (seconds - Job.decode_seconds) / section
        self._set_running(
            job_id,
            section=func.iif(is_last, Job.section, section + 1),
            step=func.iif(is_last, Job.step, 0),
            # The last decode goes on into the writing of the video, which is not measured.
            progress_at=func.iif(is_last, Job.progress_at, utc_now()),
            decode_seconds=func.coalesce(mean, seconds),
        )

    def decide(self, job_id: str, state: State, *, error: str | None = None, **made: Any) -> None:
        """Record how a job is to end, before its files move; after a crash the delivery resumes from this.

        ``made``: columns that say how it was made: timings, versions, device ...
        """
        values = {"delivery": unless_cancelled({"state": state, "error": error}), **made}
        self._change(update(Job).where(Job.id == job_id, Job.state.not_in(ENDED)).values(**values))

    def finish(
        self, job_id: str, state: State, *, error: str | None, output: str | None, stem: str | None = None
    ) -> None:
        """End a job whose files have all been moved, under the name ``stem``."""
        now = utc_now()
        made = {"error": error, "output": output, "stem": stem, "finished_at": now}
        made["open_since"] = now if state is State.FAILED else None
        with self._session() as session:
            _move(session, job_id, state, error or "delivered", delivery=None, **made)

    def requeue(self, job_id: str, note: str) -> None:
        """Put an interrupted job back into the queue, without counting an attempt."""
        with self._session() as session:
            _put_back(session, job_id, note)

    def count_attempt(self, job_id: str, note: str, *, max_attempts: int) -> int:
        """Put a running job back after its worker died or failed on it; gives how often that has happened.

        At ``max_attempts`` the same transaction decides that the job has failed.
        """
        with self._session() as session:
            _put_back(session, job_id, note, attempts=Job.attempts + 1)
            attempts = session.scalars(select(Job.attempts).where(Job.id == job_id)).one()
            if attempts >= max_attempts:
                error = f"gave up after {attempts} attempts, the last: {note}"
                failed = unless_cancelled({"state": State.FAILED, "error": error})
                session.execute(update(Job).where(Job.id == job_id).values(delivery=failed))
        return attempts

    def recover(self, running: Collection[str] = ()) -> list[Job]:
        """Put back the jobs that a dead daemon left running; only the holder of the lock may call this.

        ``running``: those that do run.
        """
        with self._session() as session:
            undecided = (Job.state == State.RUNNING, Job.delivery.is_(None), Job.id.not_in(running))
            left = list(session.scalars(select(Job).where(*undecided)))
            last = session.scalar(select(func.max(Job.position))) or 0
            for job in left:
                deaths = job.stalled_deaths + 1
                back = {"position": last + 1} if deaths >= STALLED_DEATHS else {}
                note = "the daemon ended while it ran" + (f" ({deaths} times without a step)" if back else "")
                _put_back(session, job.id, note, stalled_deaths=deaths, **back)
        return left

    # what people ask for

    def cancel(self, job_id: str, how: str) -> bool:
        """Record that a job is to end cancelled; ``how`` is ``discard`` or ``keep``.

        This decides a queued job of which nothing is kept. Any other is decided when its worker has left it
        or has written what exists. Says whether it was queued or running, and not decided yet.
        """
        at_once = Job.state == State.QUEUED if how == "discard" else false()
        decided = case((at_once, as_json(CANCELLED)), else_=as_json(None))
        undecided = update(Job).where(Job.id == job_id, Job.state.not_in(ENDED), Job.delivery.is_(None))
        return self._change(undecided.values(cancel=how, delivery=decided))

    def cancel_delivery(self, job_id: str, how: str) -> bool:
        """Decide that a job whose files cannot be moved ends cancelled; False if it has ended already."""
        left = update(Job).where(Job.id == job_id, Job.state.not_in(ENDED), Job.delivery.is_not(None))
        return self._change(left.values(cancel=how, delivery=CANCELLED))

    def retry(self, job_id: str) -> bool:
        """Put a failed or cancelled job at the back of the queue; it can run once its files are back.

        It keeps its settings, seed and history; attempts count from 0. False if it was neither.
        """
        statement = (
            update(Job)
            .where(Job.id == job_id, Job.state.in_((State.FAILED, State.CANCELLED)))
            .values(
                state=State.QUEUED,
                delivery={"state": State.QUEUED, "error": None},
                position=select(func.max(Job.position)).scalar_subquery() + 1,
                history=with_entry(State.QUEUED, "framepackd retry"),
                **{"attempts": 0, "stalled_deaths": 0, "cuts": []},
                **dict.fromkeys(("cancel", "error", "output", "quality"), None),
                **dict.fromkeys(("finished_at", "open_since"), None),
            )
        )
        return self._change(statement)

    def dismiss(self, job_id: str) -> bool:
        """Record that a person knows of a failed job; False if it has not failed."""
        failed = update(Job).where(Job.id == job_id, Job.state == State.FAILED)
        return self._change(failed.values(open_since=None))

    def begin_anew(self, job_id: str) -> None:
        """Record for a job that has not ended and does not run that it starts from the beginning."""
        note = with_entry(State.QUEUED, "framepackd retry --anew")
        statement = update(Job).where(Job.id == job_id, Job.state.not_in(ENDED))
        counts = dict.fromkeys(("section", "step", "steps_beyond", "attempts", "stalled_deaths"), 0)
        self._change(statement.values(history=note, **counts))

    def brought_back(self, job: Job) -> None:
        """Let a job whose files are back in its work folder run, or end as ``job.delivery`` says."""
        size = ("width", "height", "frames", "sections", "steps_total")
        resolved = ("inputs", "settings", "fingerprint", *size)
        values = {column: getattr(job, column) for column in (*resolved, "delivery")}
        self._change(update(Job).where(Job.id == job.id).values(**values))

    def move_to_front(self, job_id: str) -> bool:
        """Let a queued job run next; False if it is not queued.

        A running job that is interrupted still comes first. No other position changes.
        """
        with self._session() as session:
            first = session.scalars(select(func.min(Job.position))).one_or_none() or 0
            moved = update(Job).where(Job.id == job_id, *RUNNABLE).values(position=first - 1)
            if not _changed(session, moved):
                return False
            session.execute(update(Job).where(Job.state == State.RUNNING).values(position=first - 2))
        return True

    def move_before(self, job_id: str, other_id: str | None) -> bool:
        """Let a queued job run right before another one, or last; says whether both are queued."""
        with self._session() as session:
            found = session.execute(select(Job.id, Job.position).where(*RUNNABLE).order_by(*IN_ORDER)).all()
            order = [row[0] for row in found if row[0] != job_id]
            if len(order) == len(found) or (other_id is not None and other_id not in order):
                return False
            order.insert(len(order) if other_id is None else order.index(other_id), job_id)
            before, last = {row[0]: row[1] for row in found}, min(row[1] for row in found) - 1
            for each, position in zip(order, sorted(before.values()), strict=True):
                last = max(position, last + 1)  # two of one position would stay in the order of arrival
                if before[each] != last:
                    session.execute(update(Job).where(Job.id == each).values(position=last))
        return True

    def pause(self) -> None:
        """Let no job start until ``resume``, also after a restart."""
        if self.paused() is None:
            with self._session() as session:
                session.add(Meta(key=PAUSED, value=utc_now()))

    def resume(self) -> None:
        """End the pause."""
        self._change(delete(Meta).where(Meta.key == PAUSED))

    def paused(self) -> str | None:
        """Say since when the queue is paused, and how to resume it; None if it is not."""
        since = self.first(select(Meta.value).where(Meta.key == PAUSED))
        return f"by framepackd pause since {since}: framepackd resume goes on" if since else None

    def _set_running(self, job_id: str, **values: Any) -> None:
        statement = update(Job).where(Job.id == job_id, Job.state == State.RUNNING)
        self._change(statement.values({"progress_at": utc_now()} | values))


def _changed(session: Session, statement: Any) -> bool:
    return bool(session.execute(statement).rowcount == 1)  # type: ignore[attr-defined] # typed as Result


def _put_back(session: Session, job_id: str, note: str, **values: Any) -> None:
    # A job cancelled with "keep" runs once more, for the worker to write what exists.
    undecided = case((Job.cancel == "discard", as_json(CANCELLED)), else_=as_json(None))
    _move(session, job_id, State.QUEUED, note, delivery=undecided, **values)


def _move(session: Session, job_id: str, state: State, note: str, **values: Any) -> None:
    statement = update(Job).where(Job.id == job_id, Job.state.not_in(ENDED))
    if not _changed(session, statement.values(state=state, history=with_entry(state, note), **values)):
        raise StoreError(f"job {job_id} has ended already and cannot become {state}")
