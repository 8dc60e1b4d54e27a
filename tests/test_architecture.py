"""The layout shows the architecture, and what the README and the docs say of it is so."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click import Command, Group

from docs import draw_wings
from framepackd.cli.main import main
from tests.conftest import pytest_runtest_makereport
from tests.wings import AT_IMPORT, MODULES, with_torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "word", ["trust_remote_code", r"(?<!safetensors\.)torch\.load\((?!.*weights_only=True)", "import pickle"]
)
def test_nothing_runs_what_comes_with_data(word: str) -> None:
    for package in ("framepack_core", "framepackd"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(word, path.read_text()), path.name


def test_importing_the_packages_does_nothing(tmp_path: Path) -> None:
    """No file made, no network, no torch: in an empty folder, with every module that needs none."""
    heavy = with_torch(AT_IMPORT)
    modules = sorted(name for name in MODULES if name not in heavy and not name.endswith("__main__"))
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        + "".join(f"import {module}\n" for module in modules)
        + "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("in_ci", "outcome"), [("1", "failed"), ("", "skipped")])
def test_what_is_skipped_for_want_of_something_fails_in_ci_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, in_ci: str, outcome: str
) -> None:
    monkeypatch.setenv("CI", in_ci)
    report: Any = SimpleNamespace(skipped=True, outcome="skipped", longrepr="no chromium")
    hook = pytest_runtest_makereport()
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome


def commands(group: Group, prefix: str = "framepackd") -> dict[str, Command]:
    found: dict[str, Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


def test_every_command_has_help_and_is_in_the_docs() -> None:
    told = "".join(page.read_text() for page in PAGES)
    for name, command in commands(main).items():
        assert command.help, name
        assert re.search(rf"{name}\b", told), name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def prose(page: Path) -> str:
    """Leave out blocks of code: a comment in one looks like a heading."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> list[str]:
    """List a page's anchors in its order, as GitHub makes them: the second of a name gets -1."""
    names: list[str] = []
    for heading in re.findall(r"^#+ +(.*?)[ #]*$", prose(page), re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        names.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return [f"{name}-{before}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)", prose(page)):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}"


@pytest.mark.parametrize("name", ["usage", "operations", "architecture"])
def test_a_long_page_lists_its_headings_on_top(name: str) -> None:
    page = ROOT / f"docs/{name}.md"
    contents = re.findall(r"^ *- \[[^]]*\]\(#(.*)\)$", page.read_text(), re.MULTILINE)
    assert contents == headings(page)[1:]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_gives_rows_and_measures_nothing_when_imported(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert "rows" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not calls


def test_the_picture_of_the_wings_is_drawn_from_the_code_as_it_is() -> None:
    assert draw_wings.PICTURE.read_text() == draw_wings.picture(), "run python -m docs.draw_wings"
