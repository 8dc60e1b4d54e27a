"""Loads the model a job needs, keeps it for the next job, and encodes the next job's inputs ahead of time."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from framepack_core.conditioning import Conditioning
from framepack_core.engine import Engine
from framepack_core.errors import DeviceError
from framepack_core.memory import device_support, devices, footprint
from framepack_core.memory.device_errors import Verdict, judge
from framepack_core.models import contents
from framepack_core.request import Request
from framepackd.worker.messages import AheadError, Work

log = logging.getLogger(__name__)


class Engines:
    """The loaded engine, kept from job to job."""

    def __init__(self) -> None:
        """Load nothing yet."""
        self.compiled = False  # whether compiled blocks have computed a step
        self._key: tuple[Any, ...] | None = None
        self._engine: Engine | None = None
        self._digest = ""  # of the files that it was loaded from
        self._ahead: tuple[Engine, Request, Conditioning | None] | None = None
        self._not_ahead: set[str] = set()  # jobs for which memory was too small

    def get(self, work: Work, level: int) -> Engine:
        """Give the engine for a job; load it if need be."""
        key = engine_key(work)
        video = footprint.Video.asked_for(work.request, work.size)
        if self._engine is not None and key == self._key:
            self._engine.prepare(video, work.keep_free, level, work.request.loras)
            return self._engine
        self._engine = self._ahead = None  # frees the other model first
        with _alone(work.load_lock):
            self._digest = contents.digest(work.spec)
            engine = Engine.load(
                work.spec,
                str(device_of(work)),
                work.dtype,
                work.precision,
                attention=work.attention,
                video=video,
                tiling=work.vae_tiling,
                keep_free=work.keep_free,
                loras=work.request.loras,
            )
        for warning in device_support.warnings(engine.device, engine.models.dtype):
            log.warning("%s", warning)
        engine.take_level(max(engine.level, level))
        self._engine, self._key = engine, key
        return engine

    def model_digest(self, work: Work) -> str:
        """Name the model of a job by what its files hold, or held when it was loaded.

        Raises:
            ModelError: a file is missing, or does not hold the model's weights.
        """
        if self._engine is not None and engine_key(work) == self._key:
            return self._digest
        return contents.digest(work.spec)

    def encode(self, request: Request, engine: Engine) -> Conditioning:
        """Encode the inputs of a job, unless that was done ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (engine, request) and ahead[2] is not None:
            return ahead[2]
        return engine.encode(request)

    def encode_ahead(self, work: Work) -> None:
        """Encode the inputs of a later job, once, if its model is loaded and all of it fits the device.

        Raises:
            AheadError: the device is broken, and only another process can continue.
        """
        engine = self._engine
        if not work.ahead or work.job_id in self._not_ahead:
            return
        if engine is None or engine_key(work) != self._key or work.keep_only or work.continued:
            return
        ahead = (engine, work.request)
        if engine.levels[engine.level].placement != "all" or (self._ahead and self._ahead[:2] == ahead):
            return
        self._ahead = (*ahead, None)  # a failure is not repeated ahead of time
        try:
            self._ahead = (*ahead, engine.encode(work.request))
        except Exception as error:  # not the running job's fault: the later one fails when it starts
            # Only the text: the error keeps its frames' tensors alive.
            verdict, why = judge(error), str(error).partition("\n")[0]
        else:
            return
        if verdict in (Verdict.CONTEXT, Verdict.MEMORY_AND_CONTEXT):
            raise AheadError(work.job_id, why)
        log.info("job %s: cannot be encoded ahead: %s", work.job_id, why)
        if verdict is Verdict.MEMORY:
            self._not_ahead.add(work.job_id)
            devices.release_unused(engine.device)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other worker loads: the plan for a model counts the memory that the machine has free."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # it ends with the process, however that ends
        yield


def engine_key(work: Work) -> tuple[Any, ...]:
    """Name all that a loaded engine depends on."""
    return (work.spec, work.device, work.dtype, work.precision, work.attention, work.vae_tiling)


def device_of(work: Work) -> torch.device:
    """Choose the device that a job computes on."""
    try:
        return devices.choose_device(work.device, gpu_expected=work.gpu_expected)
    except DeviceError:
        if not work.keep_only:
            raise
        return torch.device("cpu")  # only what exists is written: no device computes
