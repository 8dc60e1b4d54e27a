"""framepackd nodes: shows the other machines that compute, asks one, takes one out and brings it back."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from framepackd.cli.options import EXIT_USAGE, config_option, fail, load
from framepackd.text import printable_json

if TYPE_CHECKING:
    from framepackd.jobs.report import FleetReport, NodeReport
    from framepackd.settings.config import Config

ANSWER_SECONDS = 90.0  # for the cards of a machine to say what they have
ROUND_SECONDS = 0.3  # before they are looked at again

host_argument = click.argument("host")


@click.group(
    invoke_without_command=True, short_help="Show the other machines that compute, and what they do."
)
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.pass_context
def nodes(context: click.Context, config_file: Path | None, *, as_json: bool) -> None:
    """Show the other machines that compute: whether they answer, their cards, versions and jobs.

    Exit code 0: all that get jobs answer; 1: one does not; 3: no daemon runs.
    """
    if context.invoked_subcommand is not None:
        context.obj = config_file
        return
    config = load(config_file)
    report = _report(config)
    if as_json:
        click.echo(printable_json(report))
    else:
        from framepackd.cli import display, page_of_nodes

        display.show(page_of_nodes.page(report))
    silent = [node for node in report["nodes"] if not node["reachable"] and not node["drained"]]
    sys.exit(1 if silent or report["trouble"] or not report["nodes"] else 0)


@nodes.command("check", short_help="Ask a machine for its versions and models.")
@config_option
@host_argument
def check_node(config_file: Path | None, host: str) -> None:
    """Ask a machine for its versions and models, and compare them with those here.

    Cards that work are not asked again: what they said when they were reached is shown.
    """
    config = load(_of_group(config_file))
    _change_quietly(config, {"command": "ask_again", "host": host})
    deadline = time.monotonic() + ANSWER_SECONDS
    node = _node(config, host)
    while _is_asked(node) and time.monotonic() < deadline:
        time.sleep(ROUND_SECONDS)
        node = _node(config, host)
    from framepackd.cli import checks, display, page_of_nodes

    results = list(page_of_nodes.checks_of(node, config))
    display.show(checks.checks(results), soft_wrap=True)
    sys.exit(1 if any(fine is False for fine, _, _ in results) else 0)


@nodes.command("drain", short_help="Give a machine no more jobs.")
@config_option
@host_argument
@click.option("--now", is_flag=True, help="Its jobs leave at their next step and go on elsewhere.")
def drain(config_file: Path | None, host: str, *, now: bool) -> None:
    """Give a machine no more jobs, until undrain; also after a restart."""
    from framepackd.cli.jobs import change

    change(load(_of_group(config_file)), {"command": "drain", "host": host, "now": now})


@nodes.command("undrain", short_help="Give a drained machine jobs again.")
@config_option
@host_argument
def undrain(config_file: Path | None, host: str) -> None:
    """Give a drained machine jobs again."""
    from framepackd.cli.jobs import change

    change(load(_of_group(config_file)), {"command": "undrain", "host": host})


def _of_group(config_file: Path | None) -> Path | None:
    """Give the option of the command or, where it has none, that of ``nodes`` before it."""
    parent = click.get_current_context().parent
    return config_file or (parent.obj if parent and isinstance(parent.obj, Path) else None)


def _report(config: "Config") -> "FleetReport":
    """Ask the daemon; ends the command where none runs or none can tell."""
    from framepackd.control import client
    from framepackd.control.nodes import NO_NODES

    if not config.cluster.nodes:
        fail(NO_NODES, EXIT_USAGE)
    try:
        report = client.nodes(config)
    except OSError as error:
        fail(f"{config.state_dir}: {error}", 1)
    if report is None:
        fail("no daemon runs, and only it knows the other machines: framepackd run", client.EXIT_NOT_RUNNING)
    return report


def _node(config: "Config", host: str) -> "NodeReport":
    return next(node for node in _report(config)["nodes"] if node["name"] == host)


def _is_asked(node: "NodeReport") -> bool:
    """Say whether a card of a machine has not answered yet."""
    return any(card["asked"] for card in node["cards"])


def _change_quietly(config: "Config", request: dict[str, str]) -> None:
    """Have the daemon do something; ends the command if it cannot."""
    from framepackd.control import client

    _report(config)
    try:
        (result,) = client.perform(config, request)
    except OSError as error:
        fail(f"{config.state_dir}: {error}", 1)
    if not result["done"]:
        fail(result["message"], 1)
