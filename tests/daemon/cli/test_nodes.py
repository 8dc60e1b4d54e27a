"""framepackd nodes: what it shows of other machines, what it asks them, and its exit codes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from framepackd.cli.main import main
from framepackd.control import client, commands
from framepackd.settings.config import Config
from framepackd.worker.versions import versions
from tests.daemon.supervisor.remote_cards import FAST, Machines


class Front:
    """A daemon beside other machines, and the commands that ask it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, nodes: str | tuple[str, ...]) -> None:
        self.machines = Machines(folder / "place", monkeypatch, nodes, devices=())
        self.file = folder / "place/config.toml"
        self.file.write_text(f"{self.file.read_text()}[cluster]\nnodes = {json.dumps(nodes)}\n")
        self.greets: dict[str, Any] | None = {}  # how cards greet that are asked
        self.greeted = 0
        monkeypatch.setattr(client, "ask", self._ask)

    def _ask(self, _: Config, request: dict[str, Any]) -> Any:
        daemon = self.machines.loop.daemon
        if request["command"] in commands.CHANGING:
            done, message = self.machines.ask(**request)
            return {"results": [{"done": done, "message": message}]}
        self.machines.round()
        for bridge in self.machines.bridges[self.greeted :] if self.greets is not None else ():
            bridge.greet(**self.greets or {})
            self.greeted += 1
        self.machines.round()
        return daemon.answer(request)

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["nodes", *arguments[:1], "--config", str(self.file), *arguments[1:]])


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Front:
    return Front(tmp_path, monkeypatch, "all")


def test_each_machine_and_card_has_a_line(front: Front) -> None:
    front.machines.roll.joined("render2", "cuda:0", "cuda:1")
    front.machines.drop("a")
    said = front.run()
    lines = said.stdout.splitlines()
    assert said.exit_code == 0, said.output
    assert lines[0].startswith("● render2")
    assert "answers, last sign" in lines[0]
    assert lines[1].split()[0] == "render2:cuda:0"
    assert f"{FAST}, driver 550.54; framepackd {versions()['framepackd']}, torch" in lines[1]
    assert f"runs job {front.machines.job('a').id}" in said.stdout


def test_a_machine_that_does_not_answer_is_told_by_the_exit_code_unless_it_is_drained(front: Front) -> None:
    front.machines.roll.joined("render2")
    front.run()
    front.machines.roll.joined("render2", alive=False)
    said = front.run()
    assert (said.exit_code, "render2 does not answer" in said.stdout) == (1, True)
    assert front.run("drain", "render2").exit_code == 0
    said = front.run()
    assert (said.exit_code, "drained since" in said.stdout) == (0, True)


def test_programs_get_one_object(front: Front) -> None:
    front.machines.roll.joined("render2")
    report = json.loads(front.run("--json").stdout)
    (node,) = report["nodes"]
    (card,) = node["cards"]
    assert (report["trouble"], node["reachable"], card["versions"]) == (None, True, versions())


def test_without_machines_in_the_configuration_it_says_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'state_dir = "{tmp_path}"\n')
    said = CliRunner().invoke(main, ["nodes", "--config", str(tmp_path / "config.toml")])
    assert (said.exit_code, "nodes under [cluster]" in said.stderr) == (2, True)


def test_without_a_daemon_the_exit_code_is_that_of_status(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'state_dir = "{tmp_path}"\n[cluster]\nnodes = "all"\n')
    said = CliRunner().invoke(main, ["nodes", "--config", str(tmp_path / "config.toml")])
    assert (said.exit_code, "no daemon runs" in said.stderr) == (3, True)


def test_a_check_asks_anew_and_finds_all_there(front: Front) -> None:
    front.machines.roll.joined("render2")
    front.run()
    said = front.run("check", "render2")
    assert said.exit_code == 0, said.output
    assert len(front.machines.bridges) == 2
    for word in ("answers at 10.0.0.7", FAST, f"torch {versions()['torch']}"):
        assert word in said.stdout
    assert re.search(r"✓  model +demo\n", said.stdout)


def test_a_drained_machine_can_be_checked_and_stays_drained(front: Front) -> None:
    front.machines.roll.joined("render2")
    front.run()
    front.run("drain", "render2")
    said = front.run("check", "render2")
    assert said.exit_code == 0, said.output
    assert "it gets no jobs: framepackd nodes undrain render2" in said.stdout
    front.machines.drop("a")
    front.run()
    assert front.machines.job("a").state == "queued"
    assert front.machines.bridges[-1].exitcode is not None, "its card is free again"


def test_while_the_queue_is_paused_nobody_is_asked(front: Front) -> None:
    front.machines.store.pause()
    front.machines.loop.daemon.paused = front.machines.store.paused()
    front.machines.roll.joined("render2")
    front.machines.round()
    said = front.run("check", "render2")
    assert said.exit_code == 1
    assert "it is not asked while the queue is paused" in said.stdout


def test_a_check_names_the_model_that_is_missing_there(front: Front) -> None:
    front.greets = {"models": ("demo-f1",)}
    front.machines.roll.joined("render2")
    front.run()
    said = front.run("check", "render2")
    assert said.exit_code == 1
    assert "demo is not there: framepackd models download demo there" in said.stdout
    assert "also demo-f1" in said.stdout


def test_a_check_of_an_unknown_machine_lists_the_known_ones(front: Front) -> None:
    front.machines.roll.joined("render2")
    front.run()
    said = front.run("check", "rendr2")
    assert (said.exit_code, "there are render2" in said.stderr) == (1, True)


def test_a_check_of_a_machine_that_never_joined_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Front(tmp_path, monkeypatch, ("render2",)).run("check", "render2")
    assert (said.exit_code, "render2 has not joined" in said.stdout) == (1, True)


def test_a_machine_is_drained_and_brought_back_without_a_daemon_too(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'state_dir = "{tmp_path}"\n[cluster]\nnodes = ["render2"]\n')
    config = ["--config", str(tmp_path / "config.toml")]
    drained = CliRunner().invoke(main, ["nodes", *config, "drain", "render2"])
    assert "render2 is drained: it gets no more jobs" in drained.stdout, (
        "the option may come before the command"
    )
    assert CliRunner().invoke(main, ["nodes", "drain", *config, "render3"]).exit_code == 1
    said = [CliRunner().invoke(main, ["nodes", "undrain", *config, "render2"]).stdout for _ in range(2)]
    assert said == ["render2 gets jobs again\n", "render2 was not drained\n"]


def test_where_no_machine_is_configured_none_can_be_drained(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'state_dir = "{tmp_path}"\n')
    said = CliRunner().invoke(main, ["nodes", "drain", "--config", str(tmp_path / "config.toml"), "render2"])
    assert (said.exit_code, "names no other machine" in said.stderr) == (1, True)
