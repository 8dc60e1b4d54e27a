"""Opens the database: its schema version, migrations, and the settings of every connection.

It survives a power cut: WAL with ``synchronous=FULL`` fsyncs every commit; there is one every few seconds.
A file that is not ours, damaged or of a newer version is refused and never written.
"""

import contextlib
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool, StaticPool

from framepackd import files
from framepackd.files import filesystem_type
from framepackd.jobs.job import Base
from framepackd.problems import CommandError
from framepackd.text import printable

APPLICATION_ID = 0x4650444D  # "FPDM": tells our files from other SQLite files
SCHEMA_VERSION = 6
# The statements that make each version of the one before it; those of a released version never change.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    2: (
        "ALTER TABLE job ADD COLUMN cancel VARCHAR",
        "ALTER TABLE job ADD COLUMN stem VARCHAR",
        "ALTER TABLE job ADD COLUMN computation JSON DEFAULT '{}' NOT NULL",
        'CREATE TABLE meta ("key" VARCHAR NOT NULL, value VARCHAR NOT NULL, PRIMARY KEY ("key"))',
        'CREATE TABLE memory_rung ("key" VARCHAR NOT NULL, rung INTEGER NOT NULL, PRIMARY KEY ("key"))',
    ),
    3: ("ALTER TABLE job ADD COLUMN cuts JSON DEFAULT '[]' NOT NULL",),
    4: (
        "DROP INDEX ix_job_state",
        "CREATE INDEX ix_job_queue ON job (state, position)",
        "CREATE INDEX ix_job_name ON job (name, folder)",
        "CREATE INDEX ix_job_finished_at ON job (finished_at)",
        "CREATE INDEX ix_job_undelivered ON job (position) WHERE delivery IS NOT NULL",
    ),
    5: (
        "ALTER TABLE job ADD COLUMN open_since VARCHAR",  # people know of what failed before
        "CREATE INDEX ix_job_open ON job (open_since) WHERE open_since IS NOT NULL",
    ),
    6: ("ALTER TABLE job ADD COLUMN steps_beyond INTEGER DEFAULT 0 NOT NULL",),
}
# On these, processes cannot share memory or locks are unreliable, and WAL needs both.
NETWORK_FILESYSTEMS = (
    *("nfs", "cifs", "smb", "ceph", "afs", "lustre", "beegfs", "gpfs"),
    *("fuse.sshfs", "fuse.rclone", "fuse.glusterfs", "fuse.s3fs"),
)
BUSY_MILLISECONDS = 5000  # how long to wait for a lock of another program
KEPT_BACKUPS = 3  # of the database before a migration
# Errors that may pass: room is made, a lock is released, a disk comes back.
PASSING = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
)
REMEDIES = {
    sqlite3.SQLITE_BUSY: "another program holds it (fuser names it): close that one",
    sqlite3.SQLITE_LOCKED: "another program holds it (fuser names it): close that one",
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_IOERR: "its disk fails or is full: look into the kernel's log (dmesg) and make room",
}
REMEDY = (
    "check that it is a SQLite file on a local disk, readable and writable for this user as is its folder"
)
DAMAGED = (
    "it is damaged: put a backup in its place, or move it away together with its -wal and -shm files and "
    "start again: the files in the work folders (jobs/) are then taken in again"
)


class StoreError(CommandError):
    """The database cannot be used; the text says why and what to do."""


class StoreUnavailableError(StoreError):
    """The database cannot be used just now; nothing has changed, and the same call may work later."""


def open_database(path: Path, *, read_only: bool = False) -> Engine:
    """Open the database, create it if it is not there, and bring an older one up to date.

    Only the holder of the state folder's lock may write. A reader changes nothing: it brings a copy of an
    older database up to date in memory.

    Raises:
        StoreError: it is damaged, another program's, of a newer version, or cannot be opened.
    """
    if not read_only and not os.path.lexists(path):
        _create(path)
    version = _verify(path)  # before a connection that could change anything
    if read_only:
        return _connect_to(path, mode="ro") if version == SCHEMA_VERSION else _copy_in_memory(path, version)
    engine = _connect_to(path, mode="rw")
    if version < SCHEMA_VERSION:
        _back_up(path, version)
        _migrate(engine, path, version)
    with explained(path), engine.begin() as connection:  # fails now if it cannot be written
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return engine


def _create(path: Path) -> None:
    _refuse_network(path)
    log = _beside(path, "-wal")
    if log.exists() and log.stat().st_size:  # SQLite would apply it to the new database
        raise StoreError(f"{log} lies there without its database: bring {path.name} back, or move it away")
    with files.written_aside(path) as part:
        for file in (part, _beside(part, "-wal"), _beside(part, "-shm")):
            file.unlink(missing_ok=True)
        _make_private(part)
        with explained(path), _connect_to(part, mode="rwc").begin() as connection:
            Base.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _make_private(path: Path) -> None:
    """Make an empty file that only this user can read; SQLite gives its -wal and -shm files the same mode."""
    with contextlib.suppress(OSError):  # then SQLite fails too, and its error says why
        path.touch(0o600, exist_ok=False)
        path.chmod(0o600)  # an ACL of the folder may have opened it


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _refuse_network(path: Path) -> None:
    kind = filesystem_type(path.parent)
    if kind.startswith(NETWORK_FILESYSTEMS):
        raise StoreError(
            f"{path} is on a network file system ({kind}), where SQLite is not safe: set state_dir to a "
            "folder on a local disk; inbox and outbox may stay where they are"
        )


def _verify(path: Path) -> int:
    """Check that the file is our database and whole, and give the version of its schema."""
    _refuse_network(path)
    if path.exists() and not path.is_file():
        raise StoreError(f"{path} is not a file: move it away, or set another state_dir")
    if path.exists() and path.stat().st_size == 0:
        raise StoreError(f"{path} is empty: {DAMAGED}")
    with explained(path), _connect_to(path, mode="ro").begin() as connection:
        application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if application != APPLICATION_ID:
            raise StoreError(f"{path} is not framepackd's database: move it away, or set another state_dir")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} was written by a newer framepackd (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): install the newer version again"
            )
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()  # 10 ms for 10,000 jobs
    if found != "ok":
        raise StoreError(f"{path} cannot be used ({printable(str(found))}): {DAMAGED}")
    return version


def _back_up(path: Path, version: int) -> None:
    """Keep a copy of the database as it was, in the same folder."""
    try:
        with files.written_aside(_beside(path, f".schema-{version}")) as part:
            part.unlink(missing_ok=True)
            _make_private(part)
            with closing(_connect(path, "ro")) as source, closing(sqlite3.connect(part)) as copy:
                source.backup(copy)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            f"{path} cannot be copied before it is brought up to date ({error}): make room beside it"
        ) from error
    for old in _backups(path)[:-KEPT_BACKUPS]:
        old.unlink()


def _backups(path: Path) -> list[Path]:
    """List the copies that ``_back_up`` made, the oldest first; no other files."""
    name = re.compile(rf"{re.escape(path.name)}\.schema-([0-9]+)")
    found = [
        (int(match[1]), copy)
        for copy in path.parent.iterdir()
        if (match := name.fullmatch(copy.name)) and stat.S_ISREG(copy.lstat().st_mode)
    ]
    return [copy for _, copy in sorted(found)]


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True)


def _migrate(engine: Engine, path: Path, version: int) -> None:
    """Bring the schema up to date, one version after the other, each in one transaction."""
    for following in range(version + 1, SCHEMA_VERSION + 1):
        with explained(path), engine.begin() as connection:
            for statement in MIGRATIONS[following]:
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"PRAGMA user_version = {following}")


def _copy_in_memory(path: Path, version: int) -> Engine:
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    with closing(_connect(path, "ro")) as source:
        source.backup(memory)
    engine = create_engine("sqlite://", creator=lambda: memory, poolclass=StaticPool)
    _begin_ourselves(engine, "BEGIN")
    memory.isolation_level = None
    _migrate(engine, path, version)
    return engine


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into StoreErrors that say what to do."""
    try:
        yield
    except DatabaseError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # without the details of the extended code
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreError(f"{path} cannot be used ({error.orig}): {DAMAGED}") from error
        kind = StoreUnavailableError if code in PASSING else StoreError
        remedy = REMEDIES.get(code, REMEDY)
        raise kind(f"{path} cannot be used ({error.orig}): {remedy}; nothing in it was changed") from error
    except (UnicodeError, JSONDecodeError) as error:
        raise StoreError(f"{path} cannot be used ({error}): {DAMAGED}") from error


def _connect_to(path: Path, *, mode: str) -> Engine:
    """Make an engine that sets up every connection; fails if SQLite ignores a pragma, which it does silently.

    ``mode`` is SQLite's: ``ro`` to read, ``rw`` to write, ``rwc`` to create as well.
    """
    engine = create_engine("sqlite://", creator=lambda: _connect(path, mode), poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        pragmas: dict[str, str | int] = {"busy_timeout": BUSY_MILLISECONDS}
        if mode != "ro":
            pragmas |= {"journal_mode": "wal", "synchronous": 2}  # 2: FULL
        with closing(connection.cursor()) as cursor:
            for pragma, value in pragmas.items():
                cursor.execute(f"PRAGMA {pragma} = {value}")
                (found,) = cursor.execute(f"PRAGMA {pragma}").fetchone()
                if found != value:
                    raise StoreError(f"{path} cannot be used ({pragma} is {found}, not {value}): {REMEDY}")

    _begin_ourselves(engine, "BEGIN" if mode == "ro" else "BEGIN IMMEDIATE")
    return engine


def _begin_ourselves(engine: Engine, statement: str) -> None:
    """Begin each transaction at its first statement.

    By default sqlite3 begins later: two threads could claim one job, and DDL would not be rolled back.
    """

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.execute(text(statement))
