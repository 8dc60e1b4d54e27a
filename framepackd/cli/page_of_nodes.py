"""Draws the other machines that compute in a terminal, and what a check of one has found."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framepackd.text import clock, printable
from framepackd.worker.versions import versions

if TYPE_CHECKING:
    from framepackd.jobs.report import CardReport, FleetReport, NodeReport
    from framepackd.machine.check import Check
    from framepackd.settings.config import Config


def page(report: "FleetReport", now: datetime | None = None) -> RenderableType:
    """Draw what ``nodes --json`` holds: a line a machine, and one for each of its cards."""
    now = now or datetime.now(UTC)
    grid = Table.grid(padding=(0, 2))
    for node in report["nodes"]:
        dot = "dim" if node["drained"] else "green" if node["reachable"] else "red"
        grid.add_row(Text.assemble(("● ", dot), (printable(node["name"]), "bold")), _told(node, now))
        for card in node["cards"]:
            grid.add_row(
                Text(f"  {printable(card['name'])}"), Text(printable(_of_card(card)), overflow="fold")
            )
    trouble = [Text(printable(report["trouble"]), style="bold red")] if report["trouble"] else []
    nobody = (
        [] if trouble or report["nodes"] else [Text("no other machine has joined: run framepackd node there")]
    )
    return Group(*trouble, *nobody, grid)


def _told(node: "NodeReport", now: datetime) -> Text:
    told = [f"drained since {clock(node['drained'], now)}"] if node["drained"] else []
    if node["reachable"]:
        told.append("answers")
    elif node["why"]:
        told.append(node["why"])
    if node["last_sign"]:
        told.append(f"last sign {clock(node['last_sign'], now, seconds=True)}")
    return Text(printable(", ".join(told)), overflow="fold")


def _of_card(card: "CardReport") -> str:
    told = [card["hardware"] or "not reached yet"]
    if card["versions"] is not None:
        told.append(f"framepackd {card['versions'].get('framepackd')}, torch {card['versions'].get('torch')}")
    if card["job"] is not None:
        told.append(f"runs job {card['job']}")
    if card["held"] is not None:
        told.append(card["held"])
    return "; ".join(told)


def checks_of(node: "NodeReport", config: "Config") -> "Iterator[Check]":
    """Say of a machine whether it answers, and of its cards whether versions and models are as here."""
    reachable = node["reachable"]
    yield reachable, node["name"], f"answers at {node['address']}" if reachable else str(node["why"])
    if node["drained"]:
        yield "warning", "drained", f"it gets no jobs: framepackd nodes undrain {node['name']}"
    if reachable and not node["cards"]:
        yield (
            False,
            "cards",
            f"it has none of those that are named: {', '.join(config.cluster.cards)}",
        )
    for card in node["cards"]:
        yield from _checks_of_card(card, config)


def _checks_of_card(card: "CardReport", config: "Config") -> "Iterator[Check]":
    name, there, models = card["name"], card["versions"], card["models"]
    if there is None or models is None:
        yield False, name, card["held"] or "it does not answer: look into the log of framepackd node there"
        return
    yield True, name, str(card["hardware"])
    here = versions()
    others = [
        f"{key} {there.get(key)} there, {here.get(key)} here" for key in here if here[key] != there.get(key)
    ]
    yield (
        not others,
        "versions",
        ", ".join(others) or ", ".join(f"{key} {value}" for key, value in here.items()),
    )
    needed = dict.fromkeys([config.model, *config.models])
    for model in needed:
        missing = f"{model} is not there: framepackd models download {model} there"
        yield model in models, "model", model if model in models else missing
    more = [model for model in models if model not in needed]
    if more:
        yield None, "models", f"also {', '.join(more)}"
