"""The worker process: does one piece of work after the other until the daemon ends.

A process of its own, so that a crash of the model's code ends neither the daemon nor the queue.
torch is imported only inside functions here: the daemon imports this module to start the process.
"""

import ctypes
import errno
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from framepack_core.errors import DeviceError, FramePackError, FreshProcessError
from framepack_core.memory import before_torch
from framepackd import files
from framepackd.worker import other_device
from framepackd.worker.kept import Mirrored
from framepackd.worker.messages import (
    Again,
    AheadError,
    Blocked,
    Failed,
    Message,
    Sampled,
    Waits,
    Work,
    leaves_after,
)

if TYPE_CHECKING:
    from framepackd.worker.engines import Engines
    from framepackd.worker.finishing import Finishing, SharedConnection

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
# The daemon decides when to stop; Ctrl-C and systemd send these to the worker as well.
FOR_THE_DAEMON = (signal.SIGINT, signal.SIGTERM)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main(connection: Connection, parent: int, device: str) -> None:
    """Do one piece of work after the other until the daemon closes the connection or dies."""
    die_with(parent)
    for number in FOR_THE_DAEMON:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_DAEMON)
    before_torch.set_up(device)
    set_environment()
    gc.disable()  # a seventh of the imports would go into looking for garbage, of which they make none
    from framepackd.worker.engines import Engines
    from framepackd.worker.finishing import Finishing, SharedConnection

    gc.enable()
    engines, shared = Engines(), SharedConnection(connection)
    finishing, mirrored = Finishing(shared), Mirrored(shared.send)
    files.observe(mirrored)
    while True:
        try:
            work = connection.recv()
        except (EOFError, ConnectionResetError):  # the daemon is gone, perhaps in the middle of a message
            return
        if isinstance(work, Work):  # else a message about work that is over
            if work.mirrored:
                mirrored.begin(work)
                shared.send_behind()
            reply = answer(work, engines, shared, finishing)
            if leaves_after(reply):
                finishing.wait()  # after this reply nobody listens
            shared.send(reply)
            if work.mirrored and not isinstance(reply, Sampled):
                mirrored.end(work)
            finishing.begin()
            if leaves_after(reply):
                shared.flush()
                return


def answer(
    work: Work,
    engines: "Engines",
    connection: "Connection | SharedConnection",
    finishing: "Finishing | None" = None,
) -> Message:
    """Do the work, and give the message that ends it.

    With ``finishing`` the video is left to it, and the message says that all is sampled.
    """
    from framepackd.worker.generation import Generation

    def generate() -> Message:
        generation = Generation(work, engines, connection)
        reply = generation.run(write=finishing is None)
        if finishing is not None and isinstance(reply, Sampled):
            finishing.give(lambda: replied(generation.write, work))
        return reply

    return replied(generate, work)


def replied(make: Callable[[], Message], work: Work) -> Message:
    """Give the message that ends a job; the one place where exceptions become failures."""
    from framepack_core.memory.device_errors import Verdict, judge

    try:
        return make()
    except DeviceError as error:
        return Blocked(str(error), device=True)
    except FramePackError as error:
        return Failed(str(error), retry=False)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the daemon is gone
    except AheadError as error:
        return Again(str(error), not_ahead=error.job_id)
    except FreshProcessError as error:
        return Again(str(error))
    except other_device.OtherDeviceError as error:
        return Waits(str(error), error.made_on, error.here)
    except Exception as error:
        traceback.print_exc()
        if getattr(error, "errno", None) in DISK_ERRORS:  # FFmpeg's errors are not all OSErrors
            return Blocked(f"{work.result.parent}: {error}")
        broken = judge(error) is not Verdict.NOTHING
        return Failed(f"{type(error).__name__}: {error}", retry=True, device=broken)


def manner_of_death(code: int) -> str:
    """Say in words how a process ended by itself or by a signal, from its exit code."""
    if code >= 0:
        return f"ended by itself with exit code {code}"
    killed = signal.Signals(-code)
    hint = ": the kernel does so when memory runs out" if killed is signal.SIGKILL else ""
    return f"was killed by {killed.name} ({signal.strsignal(killed)}{hint})"


def die_with(parent: int) -> None:
    """Have the kernel end this process with the daemon, however that dies: two must never share a GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def set_environment() -> None:
    """Tell the libraries, before they are imported, that nothing is fetched and that processes are forked."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # `models download` fetches models, nothing else does
