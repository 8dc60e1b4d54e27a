"""Handles signals: stop, or read the configuration again."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def hearing_signals(stop: Callable[[], None], reload: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP call these inside the block; they set flags that the loop reads."""
    in_terminal = os.isatty(2)

    def hang_up(*_: object) -> None:
        if in_terminal and not os.isatty(2):
            stop()  # the terminal's window was closed
        else:
            reload()

    stops = dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda *_: stop())
    handlers = {**stops, signal.SIGHUP: hang_up}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
