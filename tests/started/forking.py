"""Forks the workers of the daemons that tests start from one process, which has imported what each imports.

Alone, a worker imports libraries for seconds, and the tests start more than fifty. A forked one is a process
as well: with the environment, the folder, the mounts, the group, the output and the end of the pipe that its
daemon gives it. Its parent, a process of its own, ends it with the daemon and says how it ended.

With ``SPAWN_WORKERS=1`` each daemon starts its own.
"""

import ctypes
import gc
import hashlib
import importlib
import multiprocessing
import multiprocessing.spawn
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Any

VARIABLE, NOT_WANTED = "FORKED_WORKERS", "SPAWN_WORKERS"
LIBRARIES = (
    "accelerate",
    "av",
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",
    "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack",
    "pydantic_settings",
    "sqlalchemy.orm",
    "transformers.models.siglip.image_processing_pil_siglip",
    "transformers.models.siglip.modeling_siglip",
)
READ_WHEN_IMPORTED = ("CUDA_", "HF_", "LD_", "MKL_", "OMP_", "PYTORCH_", "TORCH", "TRANSFORMERS_")
_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_kept: list[Connection] = []  # a worker ends with its daemon, not with the daemon's interest in it


@contextmanager
def served() -> Iterator[None]:
    """Have the daemons that are started meanwhile fork their workers."""
    with TemporaryDirectory() as folder:
        address = Path(folder) / "socket"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, __file__, str(address), "--multiprocessing-fork"]
        with Popen(command, env=environment) as process:
            os.environ[VARIABLE] = f"{_surroundings()} {address}"
            try:
                yield
            finally:
                del os.environ[VARIABLE]
                process.kill()


def fork_workers() -> None:
    """Have this daemon fork its workers, if they find the same surroundings where they are forked."""
    surroundings, address = os.environ[VARIABLE].split(maxsplit=1)
    original = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return _Context(address) if method == "spawn" else original(method)

    if surroundings == _surroundings():
        multiprocessing.get_context = get_context


def worker_of(daemon: int) -> int | None:
    """Find the worker of a daemon: it is named here, or the daemon's child."""
    for children in Path(f"/proc/{daemon}/task").glob("*/children"):
        for process in map(int, children.read_text().split()):
            # For a moment after the fork it has the daemon's command line.
            if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                return process
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and (folder / "comm").read_text().strip() == _name(daemon):
                return int(folder.name)
    return None


def _name(daemon: int) -> str:
    return f"worker {daemon}"


def _surroundings() -> str:
    """Tell what libraries read, and where a process id is valid."""
    read = sorted((name, value) for name, value in os.environ.items() if name.startswith(READ_WHEN_IMPORTED))
    spaces = [str(_namespace("self", kind)) for kind in ("net", "pid")]
    return hashlib.sha256(repr((read, spaces)).encode()).hexdigest()


def _namespace(process: int | str, kind: str) -> Path:
    return Path(f"/proc/{process}/ns/{kind}").readlink()


class _Context:
    """Stands for the context that spawns."""

    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self, address: str) -> None:
        self.address = address

    def Process(self, target: Callable[..., None], args: tuple[Any, ...], name: str) -> Any:  # noqa: N802 # as there
        if target.__module__ != "framepackd.worker.main" or args[2].startswith("cuda"):
            return multiprocessing.context.SpawnContext.Process(target=target, args=args, name=name)
        return _Process(self.address, target, args, name)


class _Process:
    """Stands for a process that is spawned."""

    def __init__(self, address: str, target: Callable[..., None], args: tuple[Any, ...], name: str) -> None:
        self.name, self.pid, self.exitcode = name, 0, None
        self._address, self._target = address, target
        self._connection, self._daemon, *self._arguments = args

    def start(self) -> None:
        self._keeper = Client(self._address)
        _kept.append(self._keeper)
        preparation = multiprocessing.spawn.get_preparation_data(self.name)
        del preparation["authkey"]  # it is pickled for spawned processes only
        os.umask(umask := os.umask(0o077))
        self._keeper.send((self._daemon, preparation, dict(os.environ), umask))
        self._keeper.send_bytes(reduction.ForkingPickler.dumps((self._target, self._arguments)))
        for descriptor in (self._connection.fileno(), 1, 2):
            reduction.send_handle(self._keeper, descriptor, self._daemon)
        self.pid = self._keeper.recv()

    @property
    def sentinel(self) -> int:
        return self._keeper.fileno()

    def is_alive(self) -> bool:
        self.join(0)
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        if self.exitcode is None and self._keeper.poll(timeout):
            self.exitcode = self._keeper.recv()

    def kill(self) -> None:
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _serve(address: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the tests end, and with them this process
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")  # as a worker sets them
    with Listener(address, backlog=64) as listener:
        gc.disable()
        for library in LIBRARIES:
            importlib.import_module(library)
        gc.freeze()  # nor do workers look through all of it
        gc.enable()
        while True:
            daemon = listener.accept()
            multiprocessing.active_children()  # none of the ended ones remains a zombie
            _FORK.Process(target=_keep, args=(daemon,)).start()
            daemon.close()


def _keep(daemon: Connection) -> None:
    try:
        ordered, target = daemon.recv(), daemon.recv_bytes()
        descriptors = [reduction.recv_handle(daemon) for _ in range(3)]
    except (EOFError, OSError):  # the daemon was killed before it had said all
        return
    worker = _FORK.Process(target=_work, args=(daemon, ordered, target, *descriptors))
    worker.start()
    for descriptor in descriptors:
        os.close(descriptor)
    with suppress(OSError):
        daemon.send(worker.pid)
    wait([daemon, worker.sentinel])
    worker.kill()  # if it lives, then its daemon is dead
    worker.join()
    with suppress(OSError):
        daemon.send(worker.exitcode)


def _work(keeper: Connection, ordered: Any, target: bytes, pipe: int, out: int, err: int) -> None:
    keeper.close()  # which tells of the daemon's death to the parent alone
    daemon, preparation, environment, umask = ordered
    ctypes.CDLL(None).prctl(_PR_SET_NAME, _name(daemon).encode())
    try:
        _join(daemon)
    except (FileNotFoundError, ProcessLookupError):  # it is dead
        return
    for given, standard in ((out, 1), (err, 2)):
        os.dup2(given, standard)
        os.close(given)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.spawn.prepare(preparation)
    function, arguments = reduction.ForkingPickler.loads(target)
    function(Connection(pipe), os.getppid(), *arguments)


def _join(daemon: int) -> None:
    """See the mounts that a process sees, and be in its group."""
    if _namespace(daemon, "mnt") != _namespace("self", "mnt"):
        with Path(f"/proc/{daemon}/ns/mnt").open() as mounts:
            assert not ctypes.CDLL(None).setns(mounts.fileno(), 0)
    try:
        os.setpgid(0, os.getpgid(daemon))
    except PermissionError:  # it has a session of its own
        os.setpgid(0, 0)


if __name__ == "__main__":
    _serve(sys.argv[1])
