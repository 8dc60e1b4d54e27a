"""The cards of other machines: which there are, when they are greeted, which machines get no jobs."""

import logging
import math
import socket
from collections.abc import Callable
from datetime import UTC, datetime

from framepackd.cluster import landlock
from framepackd.cluster.roll import Roll
from framepackd.jobs.job import as_recorded
from framepackd.jobs.report import CardReport, FleetReport, NodeReport
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.supervisor.passed_over import PassedOver
from framepackd.supervisor.remote import DRAINED, RemoteSupervisor

log = logging.getLogger(__name__)


class Fleet:
    """The machines that ``[cluster]`` names, and their cards as far as they are known."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        passed_over: PassedOver,
        add: Callable[[RemoteSupervisor], None],
        wake: Callable[[], None],
    ) -> None:
        """Reach nothing yet. ``add`` is called with each card that becomes known, ``wake`` when one may."""
        if not landlock.version():
            log.warning(
                "bridges run without Landlock: this kernel has none, or the unit refuses it. "
                "In that case run framepackd service install --with node"
            )
        self._config = config
        self._store = store
        self._passed_over = passed_over
        self._add = add
        self._roll = Roll(config.cluster.socket_path, wake)
        self._drained = store.drained()
        self._leaves_at_once: set[str] = set()  # drained machines whose jobs are to leave at their next step
        self._rests = True  # no card is greeted
        self.due = math.inf  # when a card has something to do that no message tells, on the monotonic clock
        self.cards: dict[str, RemoteSupervisor] = {}  # by HOST:DEVICE
        for name, card in store.cards().items():  # jobs that began on them wait for them from the start
            if config.cluster.wants(*name.split(":", 1)):
                passed_over.device_found(self._card(name), card)
        for name in config.cluster.cards:
            self._card(name)

    @property
    def hosts(self) -> list[str]:
        """The machines that are named, known, or were there once."""
        known = list(self.cards.values())  # the loop may add to them while a command is answered
        named = (*self._config.cluster.hosts, *(card.host for card in known))
        wanted = [
            node.host
            for node in list(self._roll.nodes.values())
            if any(self._config.cluster.wants(node.host, device) for device in node.devices)
        ]
        return list(dict.fromkeys((*named, *wanted)))

    @property
    def held(self) -> str | None:
        """Why there is no card at all; None if there may be one in a moment."""
        if not self._roll.answered:
            return None
        reasons = (self._roll.trouble, *map(self._why_unreachable, self.hosts))
        return next(filter(None, reasons), "no other machine has joined yet: run framepackd node there")

    @property
    def problems(self) -> list[Problem]:
        """What a person should put right: machines that do not answer, and those with the name of another."""
        if not self._roll.answered:
            return []
        if self._roll.trouble is not None:
            return [Problem("cluster", self._roll.trouble)]
        here = [host for host in self.hosts if host not in self._drained]
        reasons = (*map(self._why_unreachable, here), *map(self._why_ambiguous, here))
        return [Problem("node", reason) for reason in reasons if reason is not None]

    def meet(self) -> None:
        """Ask which machines there are, and note their cards; once a round."""
        self._roll.start()
        for node in list(self._roll.nodes.values()):
            for device in node.devices:
                if self._config.cluster.wants(node.host, device):
                    self._card(f"{node.host}:{device}")

    def look(self, now: float) -> None:
        """Note which cards can be reached; have jobs leave the drained ones."""
        waits = self._a_job_waits
        for card in self.cards.values():
            drained = card.host in self._drained
            card.look(now, self._why_card_unreachable(card), drained=drained, waits=waits)
            if card.host in self._leaves_at_once and card.busy:
                card.leave(now, DRAINED)

    def greet(self, now: float) -> None:
        """Start bridges to the cards that the queue needs, and to those of which nothing is known."""
        under_way, waits = sum(card.greeting for card in self.cards.values()), self._a_job_waits
        for card in self.cards.values():
            if card.is_wanted(now, under_way if waits else None):
                card.greet()
                under_way += 1
        self._rests = False
        self.due = min((card.due for card in self.cards.values()), default=math.inf)

    @property
    def _a_job_waits(self) -> bool:
        """Whether there is a job at all: else no card need be asked for its own next one."""
        return self._passed_over.next_job(self._config) is not None

    def rest(self) -> None:
        """Greet no card: no job is to start."""
        self.due, self._rests = math.inf, True

    def _card(self, name: str) -> RemoteSupervisor:
        """Give a card by HOST:DEVICE; one that was not known is added."""
        if name not in self.cards:
            self.cards[name] = RemoteSupervisor(self._config, self._store, name, self._passed_over)
            self._add(self.cards[name])
        return self.cards[name]

    def _why_unreachable(self, host: str) -> str | None:
        if self._roll.trouble is not None:
            return self._roll.trouble
        node = self._roll.nodes.get(host)
        if node is None and host == socket.gethostname():
            return f"{host} is this machine: its cards stand under [gpu] device, not under [cluster] nodes"
        if node is None:
            return f"{host} has not joined: run framepackd node there"
        return (
            None if node.alive else f"{host} does not answer: look whether it runs, and framepackd node on it"
        )

    def _why_ambiguous(self, host: str) -> str | None:
        node = self._roll.nodes.get(host)
        if node is None or not node.others:
            return None
        return (
            f"{host} is the name of {', '.join((node.address, *node.others))}: only the first is used; give "
            "each machine its own with framepackd node --name"
        )

    def _why_card_unreachable(self, card: RemoteSupervisor) -> str | None:
        if not self._roll.answered:
            return f"{card.host} is not known yet"
        reason = self._why_unreachable(card.host)
        if reason is None and card.there not in self._roll.nodes[card.host].devices:
            return f"{card.host} has no {card.there} now: look whether nvidia-smi lists it there"
        return reason

    def drain(self, host: str, *, at_once: bool) -> None:
        """Give a machine no more jobs; ``at_once``: those that run there leave at their next step."""
        self._store.drain(host)
        self._drained = self._store.drained()
        if at_once:
            self._leaves_at_once.add(host)

    def undrain(self, host: str) -> None:
        """Give a machine jobs again."""
        self._store.undrain(host)
        self._drained = self._store.drained()
        self._leaves_at_once.discard(host)

    def ask_again(self, host: str) -> None:
        """Greet the cards of a machine anew that do not work just now."""
        for card in self.cards.values():
            if card.host == host:
                card.ask_again()

    def end(self) -> None:
        """Ask for no machines any more."""
        self._roll.end()

    def report(self) -> FleetReport:
        """Give what ``nodes --json`` prints."""
        return {
            "trouble": self._roll.trouble,
            "nodes": [self._report_of(host) for host in sorted(self.hosts)],
        }

    def _report_of(self, host: str) -> NodeReport:
        node = self._roll.nodes.get(host)
        seen = self._roll.last_signs.get(host)
        return {
            "name": host,
            "address": None if node is None else node.address,
            "reachable": self._roll.answered and self._why_unreachable(host) is None,
            "why": self._why_unreachable(host) if self._roll.answered else "it is not known yet",
            "drained": self._drained.get(host),
            "last_sign": None if seen is None else as_recorded(datetime.fromtimestamp(seen, UTC)),
            "cards": [
                self._card_report(card) for name, card in sorted(self.cards.items()) if card.host == host
            ],
        }

    def _card_report(self, card: RemoteSupervisor) -> CardReport:
        hello, jobs = card.hello, card.jobs
        unasked = "it is not asked while the queue is paused" if self._rests and hello is None else None
        return {
            "name": card.asked,
            "card": hello.card if hello else None,
            "hardware": hello.hardware if hello else None,
            "versions": hello.versions if hello else None,
            "models": sorted(hello.models) if hello else None,
            "greeted": card.hello_at if hello else None,
            "job": jobs[0].id if jobs else None,
            "held": card.away or card.lacking or unasked,
            "asked": card.asked_now and not self._rests,
        }
