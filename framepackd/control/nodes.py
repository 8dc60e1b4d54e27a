"""Performs nodes drain, undrain and check: which other machines get jobs."""

from collections.abc import Sequence
from typing import Protocol

from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config

ON_NODES = ("drain", "undrain", "ask_again")
NO_NODES = "nodes under [cluster] in the configuration names no other machine: docs/cluster.md says how"


class Fleet(Protocol):
    """What the commands need of the part of a daemon that knows the other machines."""

    @property
    def hosts(self) -> Sequence[str]:
        """The machines that are named, known, or were there once."""

    def drain(self, host: str, *, at_once: bool) -> None:
        """Give a machine no more jobs."""

    def undrain(self, host: str) -> None:
        """Give a machine jobs again."""

    def ask_again(self, host: str) -> None:
        """Greet the cards of a machine anew that do not work just now."""


def perform_on(
    host: str, command: str, config: Config, store: JobStore, fleet: Fleet | None, *, at_once: bool
) -> tuple[bool, str]:
    """Perform a command on a machine; says whether it is done, and what is so now."""
    if not config.cluster.nodes:
        return False, NO_NODES
    drained = store.drained()
    once = (name.partition(":")[0] for name in (*store.cards(), *drained))
    known = dict.fromkeys((*config.cluster.hosts, *once) if fleet is None else (*fleet.hosts, *once))
    if host not in known:
        others = f"there are {', '.join(known)}" if known else "none has joined yet"
        return False, f"no other machine is named {host!r}: {others}"
    if command == "ask_again":
        if fleet is not None:
            fleet.ask_again(host)
        return fleet is not None, f"{host} is asked" if fleet else "no daemon runs that could ask it"
    if command == "drain":
        if fleet is None:
            store.drain(host)
        else:
            fleet.drain(host, at_once=at_once)
        then = "leaves at its next step and goes on elsewhere" if at_once else "is made there to its end"
        told = f"{host} is drained: it gets no more jobs, and what runs there {then}"
        return True, f"{told}; framepackd nodes undrain {host} has it work again"
    if fleet is None:
        store.undrain(host)
    else:
        fleet.undrain(host)
    return True, f"{host} gets jobs again" if host in drained else f"{host} was not drained"
