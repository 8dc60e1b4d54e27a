"""Cards of other machines in a test: a list of machines, and bridges that say what the test wants."""

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from framepackd.cluster.roll import Node
from framepackd.control import commands
from framepackd.jobs.job import Job
from framepackd.settings.cluster import ClusterConfig
from framepackd.settings.config import Config
from framepackd.supervisor import fleet
from framepackd.supervisor import process as worker_process
from framepackd.supervisor.remote import RemoteSupervisor
from framepackd.worker.messages import Hello, Message, Work
from framepackd.worker.versions import versions
from tests.daemon.loop import Loop

FAST, SLOW = "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"


class Roll:
    """The list of machines, as the test has it."""

    def __init__(self) -> None:
        self.nodes: Mapping[str, Node] = {}
        self.last_signs: Mapping[str, float] = {}
        self.trouble: str | None = None
        self.answered = True

    def start(self) -> None:
        """Nobody is asked."""

    def end(self) -> None:
        """Nobody was asked."""

    def joined(self, host: str, *devices: str, alive: bool = True, others: tuple[str, ...] = ()) -> None:
        self.nodes = {**self.nodes, host: Node(host, "10.0.0.7", alive, devices or ("cuda:0",), others)}
        self.last_signs = {**self.last_signs, host: 1.8e9}


class Bridge:
    """A bridge's process, and the far end of its connection."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ours, self.theirs = multiprocessing.Pipe()
        self.exitcode: int | None = None
        self.sentinel = os.eventfd(0)  # never to be heard of

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, _: float | None = None) -> None:
        """It has ended by then."""

    def kill(self) -> None:
        self.exitcode = -9 if self.exitcode is None else self.exitcode

    def say(self, *said: Message) -> None:
        for message in said:
            self.theirs.send(message)

    def greet(self, card: str = FAST, models: tuple[str, ...] = ("demo", "demo-f1")) -> None:
        self.say(Hello(versions(), self.name, f"{card}, driver 550.54", card, models))

    def got(self) -> list[Any]:
        """Give what it was told since."""
        found = []
        while not self.ours.closed and self.theirs.poll():
            found.append(self.theirs.recv())
        return found


class Machines:
    """A daemon's loop beside other machines: who is there, and the bridges that it starts, in their order."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, nodes: str | tuple[str, ...], **named: Any
    ) -> None:
        self.roll = Roll()
        self.bridges: list[Bridge] = []
        monkeypatch.setattr(fleet, "Roll", lambda *_: self.roll)
        monkeypatch.setattr(worker_process, "start_bridge", self._start)
        self.loop = Loop(root, monkeypatch, cluster=ClusterConfig(nodes=nodes), **named)
        self.store, self.cards = self.loop.place.store, self.loop.daemon.cards

    def _start(self, _: Config, host: str, device: str) -> worker_process.Handle:
        bridge: Any = Bridge(f"{host}:{device}")
        self.bridges.append(bridge)
        return worker_process.Handle(bridge, bridge.ours)

    def round(self) -> None:
        self.loop.round()

    def drop(self, folders: str, settings: str = "") -> None:
        for folder in folders:
            self.loop.place.drop(folder)
            (self.loop.place.config.inbox / folder / "cat.toml").write_text(settings)
            self.loop.place.take()

    def job(self, folder: str) -> Job:
        return self.store.matching(f"{folder}/cat")[0]

    def card(self, name: str) -> RemoteSupervisor:
        assert self.cards.fleet is not None
        return self.cards.fleet.cards[name]

    def reached(self, host: str, card: str = FAST, **named: Any) -> Bridge:
        """Have a machine with one card join, and greet."""
        self.roll.joined(host)
        self.round()
        bridge = next(bridge for bridge in reversed(self.bridges) if bridge.name == f"{host}:cuda:0")
        bridge.greet(card, **named)
        self.round()
        return bridge

    def ask(self, **request: Any) -> tuple[bool, str]:
        daemon = self.loop.daemon
        queue = commands.Queue(daemon.config, self.store, daemon.cards, daemon.deliveries)
        (result,) = commands.perform(request, queue)["results"]
        return result["done"], result["message"]

    def works(self, bridge: Bridge) -> list[str]:
        """Name the folders of the jobs that a bridge got since."""
        return [self.store.get(each.job_id).folder for each in bridge.got() if isinstance(each, Work)]
