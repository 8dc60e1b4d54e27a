"""What is remembered beside the jobs: of devices, of what cannot be compiled, of other machines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from framepackd.jobs.database import explained
from framepackd.jobs.job import MemoryLevel, Meta, utc_now
from framepackd.jobs.reader import UNCOMPILED, JobReader

# Keys of the table meta.
GPU = "gpu"  # when a GPU was last seen to compute
CARD = "card|"  # followed by a card of another machine, HOST:DEVICE: its name
DRAINED = "drained|"  # followed by another machine: since when it gets no jobs


class Notes(JobReader):
    """What is remembered in the table meta and beside it; each change is a transaction of its own."""

    def __init__(self, path: Path, reader: Engine, writer: Engine) -> None:
        """Use the connections of two engines, one of which only reads."""
        super().__init__(path, reader)
        self._writer = writer

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with explained(self.path), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def remember_level(self, key: str, level: int) -> None:
        """Remember which memory level worked; ``key`` is ``device|model|WxH``."""
        with self._session() as session:
            session.merge(MemoryLevel(key=key, level=level))

    def remember_uncompiled(self, key: str, reason: str) -> None:
        """Remember that blocks cannot be compiled; ``key`` as :func:`compiling.conditions` gives it."""
        self._note(UNCOMPILED + key, reason)

    def gpu_used(self) -> bool:
        """Say whether a GPU has ever computed here."""
        return self.first(select(Meta.key).where(Meta.key == GPU)) is not None

    def remember_gpu(self) -> None:
        """Remember that a GPU has computed here."""
        self._note(GPU, utc_now())

    def cards(self) -> dict[str, str]:
        """Give the names of the cards of other machines that were ever reached, by HOST:DEVICE."""
        return self._noted(CARD)

    def remember_card(self, device: str, card: str) -> None:
        """Remember the name of a card of another machine; ``device`` is HOST:DEVICE."""
        self._note(CARD + device, card)

    def drained(self) -> dict[str, str]:
        """Give since when machines get no jobs, by their names."""
        return self._noted(DRAINED)

    def drain(self, host: str) -> None:
        """Let a machine get no jobs until :meth:`undrain`, also after a restart."""
        if host not in self.drained():
            self._note(DRAINED + host, utc_now())

    def undrain(self, host: str) -> None:
        """Let a machine get jobs again."""
        with self._session() as session:
            session.execute(delete(Meta).where(Meta.key == DRAINED + host))

    def _noted(self, prefix: str) -> dict[str, str]:
        statement = select(Meta.key, Meta.value).where(Meta.key.startswith(prefix, autoescape=True))
        return {key.removeprefix(prefix): value for key, value in self.mapped(statement).items()}

    def _note(self, key: str, value: str) -> None:
        with self._session() as session:
            session.merge(Meta(key=key, value=value))
