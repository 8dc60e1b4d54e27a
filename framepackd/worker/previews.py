"""Draws preview.png of the section being sampled, at most every 2 s.

In a thread of its own, from the host copies of the latents that checkpoints are made of. A slow or failed
picture is skipped: the sampling never waits, and the video does not depend on it. With a tiny decoder one
takes seconds, at the lowest priority; it is cancelled when the worker leaves the job.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Self

import torch
from PIL import Image

from framepack_core.errors import ModelError
from framepack_core.media import pictures
from framepack_core.media.latent_preview import CELL_PIXELS, Colours, contact_sheet
from framepack_core.networks.taehv import TinyDecoder
from framepack_core.progress import HostCopy
from framepack_core.request import Request
from framepackd import files
from framepackd.worker.messages import Work

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0  # at most; a step of a real model takes about as long, or longer
LOWEST_PRIORITY = 19


class Previews:
    """Draws one picture after the other; offering latents never waits."""

    def __init__(self, work: Work) -> None:
        """Draw nothing yet."""
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preview")
        self._drawing: Future[None] | None = None
        self._next_at = 0.0
        self._colours: Callable[[], Colours] | None = None  # fitted once, in the thread
        self._warned = False  # that there is none
        self._leaving = threading.Event()

    @property
    def file(self) -> Path:
        """The picture, next to the preview of the video."""
        return self._work.preview.with_suffix(".png")

    def fit_to(self, request: Request, start_latents: torch.Tensor) -> None:
        """Fit the colours to a request's picture; ``start_latents`` (1, 16, 1, h, w) are its latents."""

        def fit() -> Colours:
            opened = pictures.open_picture(request.image, request.background, log.debug)  # logged at intake
            picture = pictures.crop_to(opened, self._work.size)
            return Colours.fit(start_latents.numpy(), picture)

        self._colours = cache(fit)

    def offer(self, copied: HostCopy) -> None:
        """Draw the current section from a step's progress, unless the last picture is new or unfinished."""
        now = time.monotonic()
        busy = self._drawing is not None and not self._drawing.done()
        if busy or self._colours is None or now < self._next_at:
            return
        self._next_at = now + EVERY_SECONDS
        self._drawing = self._thread.submit(partial(self._draw, self._colours, copied))

    def _draw(self, colours: Callable[[], Colours], copied: HostCopy) -> None:
        part = self.file.with_name(f"{files.PART_PREFIX}{self.file.name}.part")
        try:
            frames = self._frames(colours, copied.wait().newest)
            # Quickly: at 640x608 a third of the time, for a third more bytes.
            Image.fromarray(contact_sheet(frames)).save(part, "PNG", compress_level=1)
            part.replace(self.file)
            files.tell_written(self.file, durable=False)
        except CancelledError:
            return
        except Exception as error:  # whatever it is, only a picture is lost
            if not self._warned:
                log.warning("there is no preview of what is sampled: %s: %s", type(error).__name__, error)
            self._warned = True
            part.unlink(missing_ok=True)

    def _frames(self, colours: Callable[[], Colours], latents: torch.Tensor) -> pictures.Picture:
        if self._decoder is None:
            return colours().frames(latents.numpy())
        return self._decoder.frames(latents, CELL_PIXELS, self._cancel_if_leaving)

    @cached_property
    def _decoder(self) -> TinyDecoder | None:
        """Load the tiny decoder, in the thread; None if there is none or it cannot be used."""
        file = self._work.preview_decoder
        if file is None:
            return None
        try:
            decoder = TinyDecoder.load(file)
        except ModelError as error:
            log.warning("preview_decoder: %s; previews are drawn without it", error)
            return None
        # For this thread only, and later ones, which compute nothing: the sampling keeps its threads.
        torch.set_num_threads(1)
        with contextlib.suppress(OSError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        return decoder

    def _cancel_if_leaving(self) -> None:
        if self._leaving.is_set():
            raise CancelledError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish or cancel the last picture: then the work folder may be removed."""
        self._leaving.set()
        self._thread.shutdown()
