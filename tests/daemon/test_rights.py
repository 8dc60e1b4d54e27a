"""People who may drop files can do no more: tried as users inside and outside the group."""

import faulthandler
import fcntl
import os
import pickle
import shutil
import socket
import sqlite3
import stat
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

from framepack_core.networks import compiling
from framepackd import daemon, files, folders, rights
from framepackd.cli.main import main
from framepackd.control import client, commands
from framepackd.control import socket as control
from framepackd.delivery import results, results_page
from framepackd.jobs import database
from framepackd.jobs import lock as control_lock
from framepackd.jobs.store import JobStore
from framepackd.reports import hooks
from framepackd.rights import PRIVATE, SHARED, WALKED
from framepackd.settings.config import Config, load_config

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


class User:
    """A user of this machine, by number: needs no account."""

    def __init__(self, number: int, *groups: int) -> None:
        self.number, self.groups = number, groups

    def do(self, action: Callable[[], Any]) -> Any:
        """Do it as this user; gives what it returns, or the name of the error that it met."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups(self.groups)
                os.setgid(self.number)
                os.setuid(self.number)
                try:
                    answer = action()
                except OSError as error:
                    answer = type(error).__name__
                os.write(write, pickle.dumps(answer))
            except BaseException:
                os.write(write, pickle.dumps(traceback.format_exc()))
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as answers:
            answer = pickle.loads(answers.read())  # noqa: S301 - of our own child
        os.waitpid(child, 0)
        return answer


SERVICE = User(61000, 61000)
MEMBER = User(61001, 61000)
STRANGER = User(61002)
REFUSED = "PermissionError"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder that all users may enter, with the service's own in it."""
    folder = Path(tempfile.mkdtemp(prefix="rights-"))
    folder.chmod(0o755)
    for name in ("home", "var"):
        (folder / name).mkdir()
        os.chown(folder / name, SERVICE.number, SERVICE.number)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
    monkeypatch.setenv("CACHE_DIRECTORY", "")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def config(base: Path) -> Config:
    path = base / "config.toml"
    path.write_text(f'state_dir = "{base / "var/state"}"\nmodel = "demo"\n')
    return load_config(path)


def config_in(root: Path, more: str = "") -> Config:
    """Give a configuration with its state folder below a root."""
    path = root / "config.toml"
    path.write_text(f'state_dir = "{root}/state"\n{more}')
    return load_config(path)


def make_folders(config: Config) -> None:
    """Make all folders as a start does."""
    rights.make_folders(config)
    folders.make_new(config)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def hold(path: Path) -> str:
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return "held"


def connect(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    return "connected"


def write(path: Path) -> str:
    path.write_text("x")
    return "written"


def forbidden(state: Path, cache: Path) -> dict[str, Callable[[], Any]]:
    """Name what only the service may do."""
    return {
        "list the jobs": lambda: list((state / "jobs").iterdir()),
        "write into a job": lambda: write(state / "jobs/x/request.json"),
        "hold the lock": lambda: hold(state / "lock"),
        "read the database": lambda: (state / "framepackd.db").read_bytes()[:6],
        "write the log of the database": lambda: write(state / "framepackd.db-wal"),
        "read the copy of the database": lambda: (state / "framepackd.db.schema-1").read_bytes(),
        "read what was told": lambda: list((state / "notify").iterdir()),
        "ask the daemon": lambda: connect(state / "control.sock"),
        "write code": lambda: write(cache / "framepackd/compiled/x.py"),
        "write other code": lambda: write(cache / "framepackd/triton/x.py"),
        "put something into the state folder": lambda: write(state / f"new-{os.getpid()}"),
    }


def attempts(user: User, state: Path, cache: Path) -> dict[str, Any]:
    """Have a user try all of that; gives the outcomes."""

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            return type(error).__name__

    tried: dict[str, Any] = user.do(
        lambda: {what: attempt(action) for what, action in forbidden(state, cache).items()}
    )
    return tried


left_open: list[sqlite3.Connection] = []


def live(config: Config, mask: int, private: str) -> str:
    """Make all that a new daemon makes, under this umask."""
    os.umask(mask)
    make_folders(config)
    lock = control_lock.Lock(config.state_dir)
    rights.put_right(config)
    store = JobStore(config.database)
    left_open.append(sqlite3.connect(config.database))  # so that its log stays
    left_open[0].execute("SELECT * FROM meta").fetchall()
    with closing(sqlite3.connect(config.database)) as older:
        older.execute("PRAGMA user_version = 1")
    with mock.patch.dict(database.MIGRATIONS, dict.fromkeys(database.MIGRATIONS, ())):
        JobStore(config.database)  # an update, before which a copy is kept
    files.make_folder(config.state_dir / hooks.FOLDER, rights.PRIVATE)
    (config.jobs_dir / "x").mkdir()
    compiling.own_folder(config.cache_dir / "compiled")
    (config.cache_dir / "triton").mkdir()
    rights.put_right(config)
    store.pause()
    with control.serve(config.state_dir, lambda request: request):
        os.link(config.state_dir / "control.sock", private)  # stays when the server goes
    lock.release()
    return "made"


@as_root
@pytest.mark.parametrize("mask", [0o000, 0o007, 0o022, 0o077])
def test_members_of_the_group_may_drop_and_collect_and_nothing_else(
    config: Config, base: Path, mask: int
) -> None:
    made = SERVICE.do(lambda: live(config, mask, str(base / "var/socket")))
    assert made == "made", made
    state = config.state_dir
    (base / "var/socket").rename(state / "control.sock")
    for user in (MEMBER, STRANGER):
        tried = attempts(user, state, base / "home")
        assert tried == dict.fromkeys(tried, REFUSED)
    for folder in (config.inbox, config.outbox, config.failed, config.lora_dir):
        assert mode(folder) == SHARED, folder
    cat, video = config.inbox / "cat.png", config.outbox / "cat.mp4"
    assert MEMBER.do(lambda: write(cat)) == "written"
    assert cat.stat().st_gid == SERVICE.number, "so that the service can read it"
    assert SERVICE.do(lambda: cat.rename(video) and None) is None
    assert MEMBER.do(video.unlink) is None
    assert STRANGER.do(lambda: write(cat)) == REFUSED
    assert mode(state) == WALKED
    opened = {path.name: oct(mode(path)) for path in state.iterdir() if mode(path) & 0o077}
    assert set(opened) == {"inbox", "outbox", "failed", "loras"}, opened


def old(config: Config) -> str:
    """Make what an earlier version left, under the umask of its unit."""
    os.umask(0o007)
    state, cache = config.state_dir, config.cache_dir
    for folder in ("inbox", "outbox", "failed", "loras", "jobs/x", "compiled", "notify"):
        (state / folder).mkdir(parents=True)
    for file in ("lock", "framepackd.db", "framepackd.db-wal", "framepackd.db.schema-1", "compiled/x.so"):
        (state / file).write_text("x")
    (cache / "triton").mkdir(parents=True)
    (cache / "triton/planted.so").write_text("x")
    (state / "models").mkdir(0o755)
    (state / "link").symlink_to("/etc/passwd")
    return "left"


@as_root
def test_an_installation_of_an_earlier_version_is_corrected_at_the_start_and_logged_once(
    config: Config, base: Path
) -> None:
    assert SERVICE.do(lambda: old(config)) == "left"
    state, cache = config.state_dir, base / "home"
    before = attempts(MEMBER, state, cache)
    for what in ("list the jobs", "hold the lock", "write other code", "put something into the state folder"):
        assert before[what] != REFUSED, what
    assert MEMBER.do(lambda: write(state / "compiled/x.so")) == "written"

    config.cache_dir.chmod(0o700)  # as systemd does before the daemon starts

    def start() -> list[str]:
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patched:  # in a process of another user: no caplog reaches it
            patched.setattr(rights.log, "warning", lambda text, *values: said.append(text % values))
            assert rights.put_right(config) == []
            assert rights.put_right(config) == []
        return said

    said = SERVICE.do(start)
    assert len(said) == 1, said
    for word in ("jobs 0770 to 0700", "lock 0660 to 0600", "inbox 0770 to 2770", "compiled removed"):
        assert word in said[0]
    assert set(attempts(MEMBER, state, cache).values()) <= {REFUSED, "FileNotFoundError"}
    assert not (state / "compiled").exists()
    assert not (config.cache_dir / "triton").exists(), "others could have put code there"
    assert mode(state / "models") == 0o700
    assert mode(Path("/etc/passwd")) & 0o044, "no link is followed"


@as_root
def test_a_file_that_is_not_the_services_is_reported_with_the_command_that_corrects_it(
    config: Config,
) -> None:
    assert SERVICE.do(lambda: old(config)) == "left"
    os.chown(config.inbox, 0, 0)
    config.inbox.chmod(0o777)
    (problem,) = SERVICE.do(lambda: [tuple(problem) for problem in rights.put_right(config)])
    assert problem[0] == "rights"
    assert f"{config.inbox} has the mode 0777" in problem[1]
    assert f"sudo chmod 2770 {config.inbox}" in problem[1]


def test_folders_outside_the_state_folder_are_the_administrators_unless_the_daemon_makes_them(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\ninbox = "in"\noutbox = "srv/out"\n')
    config = load_config(path)
    config.inbox.mkdir(0o755)
    with umask(0o077):
        make_folders(config)
    assert rights.put_right(config) == []
    assert mode(config.inbox) == 0o755
    assert mode(config.outbox) == SHARED
    assert mode(config.outbox.parent) == 0o750, "can be walked through"


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Give a folder on an overlay, as in a container: files there have another device than folders."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for folder in (lower, upper, work, merged):
        folder.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=False)
    if mounted.returncode != 0:
        pytest.skip("no overlay can be mounted here")
    yield merged
    subprocess.run(["umount", merged], check=True)


@as_root
def test_files_on_an_overlay_are_corrected_and_a_folder_that_is_mounted_there_is_not(overlay: Path) -> None:
    path = overlay / "config.toml"
    path.write_text(f'state_dir = "{overlay}/state"\n')
    config = load_config(path)
    make_folders(config)
    (config.state_dir / "lock").touch()
    (config.state_dir / "lock").chmod(0o660)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", config.inbox], check=True)
    try:
        assert rights.put_right(config) == []
        assert mode(config.state_dir / "lock") == 0o600
        assert mode(config.inbox) == 0o755, "the administrator's"
    finally:
        subprocess.run(["umount", config.inbox], check=True)


def test_a_folder_on_the_way_to_a_drop_folder_can_be_walked_through(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\noutbox = "state/out/videos"\nfailed = "state/out"\n')
    config = load_config(path)
    for _ in range(2):
        make_folders(config)
        rights.put_right(config)
        assert [mode(config.failed), mode(config.outbox)] == [SHARED, SHARED]
        config.failed.chmod(0o700)


def test_nothing_is_opened_to_a_group_that_everybody_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    monkeypatch.setattr(rights, "EVERYBODY", (rights.grp.getgrgid(os.getegid()).gr_name,))
    make_folders(config)
    assert rights.put_right(config) == []
    assert [mode(config.state_dir), mode(config.inbox)] == [0o700, 0o700]


def test_checking_the_rights_does_not_take_longer_with_more_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    make_folders(config)
    for number in range(200):
        (config.jobs_dir / str(number)).mkdir()
    looked: list[str] = []
    lstat = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: looked.append(path.name) or lstat(path))
    rights.put_right(config)
    assert "jobs" in looked
    assert len(looked) < 20


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_a_folder_below_a_shared_one_is_as_open_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox").chmod(SHARED)
    with umask(mask):
        files.make_folder(tmp_path / "outbox/a/b")
        files.make_folder(tmp_path / "c")
        files.make_folder(tmp_path / "d", PRIVATE)
    assert [mode(tmp_path / "outbox/a"), mode(tmp_path / "outbox/a/b")] == [SHARED, SHARED]
    assert mode(tmp_path / "c") == 0o777 & ~mask
    assert mode(tmp_path / "d") == PRIVATE


def test_the_results_page_is_readable_for_those_who_may_collect(tmp_path: Path) -> None:
    outbox, failed = tmp_path / "outbox", tmp_path / "failed"
    outbox.mkdir()
    outbox.chmod(SHARED)
    failed.mkdir()
    (failed / "cat.error.txt").write_text("steps must be 1 to 100, got 0")
    page = results_page.ResultsPage(lambda: None)
    strip = tmp_path / "strip.jpg"
    strip.write_bytes(b"x")
    with umask(0o077):
        page.update(outbox, failed)
        results.keep_strip(strip, outbox, "20260101-000000-abcdef")
        assert mode(outbox / "index.html") == 0o640
        (outbox / "index.html").chmod(0o600)  # as a crash before would leave it
        page.update(outbox, failed)
    assert mode(outbox / "index.html") == 0o640
    assert mode(outbox / results.FOLDER) == SHARED
    assert mode(outbox / results.FOLDER / "20260101-000000-abcdef.jpg") == 0o640


def test_the_daemon_and_the_commands_that_stand_in_for_it_write_for_themselves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\n')
    masks: list[int] = []

    def record(*_: object, **__: object) -> int:
        masks.append(os.umask(0o022))
        return 0

    monkeypatch.setattr(daemon, "run", record)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)
    monkeypatch.setattr(commands, "perform", lambda *_: record() or {"results": []})
    for command in ("run", "pause"):
        with umask(0o022):
            CliRunner().invoke(main, [command, "--config", str(path)], catch_exceptions=False)
    assert masks == [0o077, 0o077]


@as_root
def test_a_user_who_may_not_ask_learns_who_may(config: Config) -> None:
    assert SERVICE.do(lambda: live(config, 0o007, str(config.state_dir.parent / "socket"))) == "made"
    report, code = MEMBER.do(lambda: client.report(config))
    assert code == client.EXIT_UNKNOWN == 4
    assert "only '#61000' and root may ask: put sudo -u '#61000' before" in report["daemon"]["error"]


@as_root
def test_compiled_code_of_another_user_is_not_run(base: Path) -> None:
    for name, owner in (("own", SERVICE), ("foreign", MEMBER)):
        (base / name).mkdir()
        os.chown(base / name, owner.number, owner.number)
        (base / name).chmod(0o777)
    assert SERVICE.do(lambda: compiling.own_folder(base / "own")) == base / "own"
    assert mode(base / "own") == 0o700
    for name in ("foreign", "none"):  # the second cannot be made
        instead = SERVICE.do(lambda name=name: compiling.own_folder(base / name))
        assert instead != base / name
        assert mode(instead) == 0o700
        instead.rmdir()


def test_what_is_compiled_lies_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/framepackd:/other")
    assert config.cache_dir == Path("/var/cache/framepackd")
    monkeypatch.setenv("CACHE_DIRECTORY", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_dir == tmp_path / "framepackd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.cache_dir == tmp_path / ".cache/framepackd"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 61000)
    assert config.cache_dir == config.state_dir / "cache", "a user without a home"
