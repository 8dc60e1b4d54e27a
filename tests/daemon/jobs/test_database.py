"""The database file: brought up to date whole or not at all, and never touched where it cannot be used."""

import os
import random
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from framepackd.jobs import database
from framepackd.jobs.database import SCHEMA_VERSION, StoreError, StoreUnavailableError, open_database
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore

# Written by the first released code (schema 1) on /srv/framepackd with the demo model: cat was made, dog
# failed for its settings, bird was made with a drawn seed, frog ran when the daemon was killed, newt waited.
SCHEMA_1 = Path(__file__).with_name("schema-1.db")


def job(number: int) -> Job:
    return Job(id=f"job-{number}", name=f"cat{number}", state=State.QUEUED, created_at=utc_now())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "framepackd.db"


@pytest.fixture
def old(path: Path) -> Path:
    """Give a database of the first schema."""
    shutil.copyfile(SCHEMA_1, path)
    return path


def ask(path: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def shape(path: Path) -> set[tuple[object, ...]]:
    """Name every column with its type, and every index."""
    names = [str(row[0]) for row in ask(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {(name, *row[1:]) for name in names for row in ask(path, f"PRAGMA table_info({name})")}
    return columns | {*ask(path, "SELECT type, name, tbl_name FROM sqlite_master WHERE type = 'index'")}


def test_a_database_of_the_first_schema_is_brought_up_to_date_and_nothing_is_lost(
    old: Path, tmp_path: Path
) -> None:
    everything = "SELECT id, name, state, settings, history, steps_run, output FROM job ORDER BY seq"
    before = ask(old, everything)
    store = JobStore(old)
    assert ask(old, everything) == before
    assert ask(old, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    JobStore(tmp_path / "fresh.db")
    assert shape(old) == shape(tmp_path / "fresh.db")
    assert [found.name for found in store.recover()] == ["frog"]
    claimed = store.claim()
    assert claimed is not None
    assert claimed.name == "frog"
    store.pause()
    store.remember_level("NVIDIA H100|framepack|640x608", 2)
    assert JobStore(old).levels() == {"NVIDIA H100|framepack|640x608": 2}
    store.remember_uncompiled("NVIDIA H100|torch 2.13.0", "fatal error")
    assert JobStore(old).uncompiled() == {"NVIDIA H100|torch 2.13.0": "fatal error"}


def test_before_a_migration_a_copy_is_kept(old: Path) -> None:
    JobStore(old)
    copy = old.with_name("framepackd.db.schema-1")
    assert ask(copy, "PRAGMA user_version") == [(1,)]
    assert ask(copy, "SELECT * FROM job") == ask(SCHEMA_1, "SELECT * FROM job")
    copy.unlink()
    JobStore(old)
    assert not copy.exists(), "only when there is need"


def test_only_the_latest_copies_are_kept(old: Path) -> None:
    for version in (7, 8, 9, 10, 11, 12):
        old.with_name(f"framepackd.db.schema-{version}").touch()
    JobStore(old)
    kept = sorted(file.name for file in old.parent.glob("*.schema-*"))
    assert kept == [f"framepackd.db.schema-{version}" for version in (10, 11, 12)]


def test_other_files_next_to_the_copies_neither_hinder_nor_are_removed(old: Path) -> None:
    theirs = [f"framepackd.db.schema-{name}" for name in ("old", "1.bak", "before update", "4-wal")]
    for name in theirs:
        old.with_name(name).touch()
    for version in (5, 6):
        old.with_name(f"framepackd.db.schema-{version}").mkdir()
    for version in (7, 8, 9):
        old.with_name(f"framepackd.db.schema-{version}").touch()
    JobStore(old)
    kept = {file.name.partition("schema-")[2] for file in old.parent.glob("*.schema-*")}
    assert kept == {"old", "1.bak", "before update", "4-wal", "5", "6", "7", "8", "9"}


def test_reading_brings_only_a_copy_up_to_date(old: Path) -> None:
    before = old.read_bytes()
    store = JobStore(old, read_only=True)
    counts = store.counts()
    assert (counts["queued"], counts["running"], counts["done"], counts["failed"]) == (1, 1, 2, 1)
    assert store.paused() is None
    assert old.read_bytes() == before
    assert not list(old.parent.glob("*.schema-*"))


def test_a_migration_that_fails_has_changed_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to its defaults, sqlite3 commits each statement that changes the schema."""
    before = shape(old)
    with monkeypatch.context() as patched:
        patched.setitem(database.MIGRATIONS, 2, (*database.MIGRATIONS[2], "ALTER TABLE nowhere ADD COLUMN x"))
        with pytest.raises(StoreError, match="no such table"):
            JobStore(old)
    assert shape(old) == before
    assert ask(old, "PRAGMA user_version") == [(1,)]
    JobStore(old)
    assert ask(old, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


def test_a_change_of_the_schema_is_rolled_back_with_its_transaction(path: Path) -> None:
    engine = open_database(path)

    def change_and_fail() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE half (made)")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        change_and_fail()
    assert ask(path, "SELECT name FROM sqlite_master WHERE name = 'half'") == []


def garbage(path: Path) -> None:
    path.write_bytes(b"this is not SQLite" * 1000)


def garbage_header(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(100) + path.read_bytes()[100:])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def overwritten(path: Path) -> None:
    content, page = path.read_bytes(), 4096
    path.write_bytes(content[:page] + random.Random(1).randbytes(page * 2) + content[3 * page :])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def anothers(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE precious (x)")


def from_the_future(path: Path) -> None:
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


UNUSABLE: dict[Callable[[Path], None], str] = {
    garbage: "is damaged",
    garbage_header: "is damaged",
    truncated: "is damaged",
    overwritten: "is damaged",
    empty: "is empty",
    directory: "is not a file",
    anothers: "is not framepackd's database",
    from_the_future: "newer framepackd",
}


@pytest.mark.parametrize("read_only", [False, True], ids=["to run", "to look"])
@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_a_file_that_cannot_be_used_is_refused_and_not_touched(
    path: Path, spoil: Callable[[Path], None], read_only: bool
) -> None:
    store = JobStore(path)
    for number in range(20):
        store.add(job(number))
    store.close()
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match=UNUSABLE[spoil]) as refused:
        JobStore(path, read_only=read_only)
    assert str(path) in str(refused.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_the_end_of_a_call_does_not_copy_the_log_into_the_database_and_the_end_of_the_store_does(
    path: Path,
) -> None:
    """Each copy is synced, which takes longer than the call."""
    store = JobStore(path)
    before = path.read_bytes()
    store.add(job(1))
    assert path.read_bytes() == before
    store.close()
    assert path.read_bytes() != before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_torn_wal_loses_only_the_torn_commits(path: Path, tmp_path: Path) -> None:
    """A power cut in the middle of a commit leaves such a one: that commit had not been made."""
    JobStore(path)
    with closing(sqlite3.connect(path)) as open_too:  # so that the log is not taken in at each end
        open_too.execute("SELECT count(*) FROM job").fetchall()
        for number in range(3):
            JobStore(path).add(job(number))
        (tmp_path / "after").mkdir()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", tmp_path / f"after/framepackd.db{suffix}")
    log = tmp_path / "after/framepackd.db-wal"
    log.write_bytes(log.read_bytes()[:-100])
    store = JobStore(tmp_path / "after/framepackd.db")
    assert list(store.states()) == ["job-0", "job-1"]
    store.add(job(2))
    assert ask(tmp_path / "after/framepackd.db", "PRAGMA integrity_check") == [("ok",)]


def test_a_wal_without_its_database_is_not_applied_to_a_new_one(path: Path) -> None:
    path.with_name("framepackd.db-wal").write_bytes(b"another's commits")
    with pytest.raises(StoreError, match="without its database"):
        JobStore(path)
    assert not path.exists()


def test_a_database_half_made_at_a_power_cut_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise InterruptedError

        patched.setattr(Path, "replace", die)
        with pytest.raises(InterruptedError):
            JobStore(path)
    assert not path.exists(), "a half-made one never has its name"
    JobStore(path).add(job(0))
    assert not list(path.parent.glob(".*")), "nothing is left of it"


def test_a_locked_database_may_be_usable_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 20)
    store = JobStore(path)
    store.add(job(0))
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailableError, match="another program holds it"):
            JobStore(path)
        with pytest.raises(StoreUnavailableError, match="another program holds it"):
            store.claim()
        assert store.path == path
        assert JobStore(path, read_only=True).counts()["queued"] == 1, "who looks does not wait"
    assert store.claim() is not None


def test_a_database_on_a_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "filesystem_type", lambda _: "nfs4")
    with pytest.raises(StoreError, match=r"network file system \(nfs4\)"):
        JobStore(path)
    assert not path.exists()


def test_a_pragma_that_does_not_hold_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite passes over what it does not understand or cannot do, such as WAL without shared memory."""
    JobStore(path)
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", -1)  # becomes 0
    with pytest.raises(StoreError, match="busy_timeout is 0, not -1"):
        JobStore(path)


@pytest.fixture
def folder_of_another() -> Iterator[Path]:
    """Give a folder where rights count for the test, too, if it runs as root."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            Path(folder).chmod(stat.S_IRWXU)
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_database_that_may_not_be_written_is_refused(folder_of_another: Path, what: str) -> None:
    path = folder_of_another / "framepackd.db"
    JobStore(path).add(job(0))
    (path if what == "file" else folder_of_another).chmod(0o500)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="cannot be used"):
        JobStore(path)
    assert path.read_bytes() == before
