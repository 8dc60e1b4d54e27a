"""What the commands print fits the terminal that it is printed in; a pipe gets no blanks at line ends."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from framepackd.cli import display
from framepackd.cli.main import main
from tests.daemon.place import Place

COMMANDS = [["status"], ["check"], ["models", "list", "--offline"]]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Has a picture that waits for its sentence, an unknown file, and names as long as phones make them."""
    place = Place(tmp_path / "place")
    (place.config.inbox / "nobody.png").write_bytes(b"x")
    (place.config.inbox / "odd.xyz").write_bytes(b"x")
    place.drop(f"a folder of somebody/{'IMG_20261129_0913_' * 4}")
    place.take()
    return place


def printed(place: Place, command: list[str]) -> str:
    arguments = [*command, "--config", str(place.config.file)]
    return CliRunner().invoke(main, arguments).stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_pipe_gets_no_blanks_at_the_ends_of_lines(place: Place, command: list[str]) -> None:
    lines = printed(place, command).splitlines()
    assert lines
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_line_is_wider_than_the_terminal(
    place: Place, monkeypatch: pytest.MonkeyPatch, command: list[str], width: int
) -> None:
    """What is for copying, paths and errors, is folded by the terminal itself."""
    screen = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(display, "console", lambda: screen)
    with screen.capture() as captured:
        printed(place, command)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert lines
    assert max(map(len, lines)) <= width
    assert command != ["status"] or any("2 waiting · 1 queued" in line for line in lines), (
        "the counts are whole"
    )
