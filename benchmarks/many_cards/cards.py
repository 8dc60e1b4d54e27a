"""Plays all cards of a daemon, in a process of its own."""

import contextlib
import heapq
import itertools
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks.many_cards import STEPS, Asked
from framepackd import files
from framepackd.control import socket
from framepackd.worker import messages

STATUS_SECONDS = 1.0  # from one question for the status to the next


@dataclass
class Player:
    """Plays all cards: each answers a job with the messages that a worker sends, at their times."""

    asked: Asked
    cards: list[Connection]
    due: list[tuple[float, int, int, Iterator[tuple[float, messages.Message]], messages.Message]] = field(
        default_factory=list
    )
    counter: Iterator[int] = field(default_factory=itertools.count)
    freed: dict[int, float] = field(default_factory=dict)  # by card: since when it waits for a job
    idle: list[float] = field(default_factory=list)

    def play(self) -> None:
        """Play until the daemon has closed all pipes."""
        begun, left = set[int](), dict(enumerate(self.cards))
        numbers = {card: number for number, card in left.items()}
        while left:
            patience = max(self.due[0][0] - time.monotonic(), 0.0) if self.due else None
            for card in wait(list(left.values()), patience):
                assert isinstance(card, Connection)
                number = numbers[card]
                try:
                    work = card.recv()
                except (EOFError, OSError):
                    del left[number]
                    continue
                if not isinstance(work, messages.Work):
                    continue
                if number in self.freed:
                    self.idle.append(time.monotonic() - self.freed.pop(number))
                # The first jobs are resumed, each at another step: so their ends lie apart, as in practice.
                total = work.sections * STEPS
                done = 0 if number in begun else total * number // len(self.cards)
                begun.add(number)
                self.follow(time.monotonic(), number, self.script(work, done))
            self.send_what_is_due(left)

    def script(self, work: messages.Work, done: int) -> Iterator[tuple[float, messages.Message]]:
        """Yield what a worker says of a job, each with the seconds that it takes before."""
        pace = self.asked.pace
        yield 0.0, messages.Ready("cpu", "cpu", "cpu")
        yield 0.0, messages.Resumed(done)
        for number in range(done, work.sections * STEPS):
            section, step = divmod(number, STEPS)
            yield pace, messages.StepDone(section + 1, step + 1, pace)
            if step == STEPS - 1:
                yield pace, messages.SectionDecoded(section + 1, pace)
        yield 0.0, messages.Sampled()
        files.make_folder(work.result)
        (work.result / ".mp4").write_bytes(b"video")
        yield pace / 2, messages.Written(messages.Finished({}, {}, {}, None))

    def follow(self, now: float, number: int, script: Iterator[tuple[float, messages.Message]]) -> None:
        """Note when the next message of a script is due."""
        for seconds, message in script:
            heapq.heappush(self.due, (now + seconds, next(self.counter), number, script, message))
            return

    def send_what_is_due(self, left: dict[int, Connection]) -> None:
        """Send the messages whose time has come, as far as their pipes have room."""
        now, full = time.monotonic(), []
        while self.due and self.due[0][0] <= now:
            at, order, number, script, message = heapq.heappop(self.due)
            if number not in left:
                continue
            room = select.poll()
            room.register(left[number], select.POLLOUT)
            if not room.poll(0):
                full.append((now + 0.001, order, number, script, message))
                continue
            with contextlib.suppress(OSError):  # the daemon has ended
                left[number].send((time.monotonic(), message))
            if isinstance(message, messages.Sampled):
                self.freed[number] = time.monotonic()
            self.follow(at, number, script)
        for each in full:
            heapq.heappush(self.due, each)


def play(asked: Asked, cards: list[Connection], results: Connection) -> None:
    """Say that they are there; play the cards, ask for the status, and send what both have found."""
    results.send(None)
    player, answers, ended = Player(asked, cards), list[float](), threading.Event()

    def ask() -> None:
        while not ended.wait(STATUS_SECONDS):
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                socket.ask(Path(asked.folder, "state"), {"command": "status"})
                answers.append(time.monotonic() - begun)

    asking = threading.Thread(target=ask, daemon=True)
    if asked.status:
        asking.start()
    player.play()
    ended.set()
    results.send((player.idle, answers))
