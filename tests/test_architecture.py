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

from framepackd.cli import main
from tests.conftest import pytest_runtest_makereport

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def imports(path: Path) -> set[str]:
    """Name every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "framepack_core").glob("*.py")), ids=lambda path: path.name)
def test_the_core_knows_nothing_of_the_daemon(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"framepackd", "sqlalchemy", "watchdog", "click", "rich", "pydantic_settings", "tests"}


IN_THE_WORKER = {"generation", "checkpoint", "previews", "video"}  # imported in its process only
IN_ITS_COMMAND = {"calibrate", "sanity"}  # likewise


def test_only_the_worker_and_the_checks_of_the_device_know_of_torch() -> None:
    heavy = {"torch", "framepack_core.engine", "framepack_core.loading", "framepack_core.memory"}
    users = {path.stem for path in (ROOT / "framepackd").glob("*.py") if imports(path) & heavy}
    assert users == {"check", *IN_THE_WORKER, *IN_ITS_COMMAND}


@pytest.mark.parametrize(
    "word", ["trust_remote_code", r"(?<!safetensors\.)torch\.load\((?!.*weights_only=True)", "import pickle"]
)
def test_nothing_runs_what_comes_with_data(word: str) -> None:
    for package in ("framepack_core", "framepackd"):
        for path in (ROOT / package).glob("*.py"):
            assert not re.search(word, path.read_text()), path.name


def test_importing_the_packages_does_nothing(tmp_path: Path) -> None:
    """No file made, no network, no torch: in an empty folder, with every module of the daemon."""
    stems = {path.stem for path in (ROOT / "framepackd").glob("[!_]*.py")} - IN_THE_WORKER - IN_ITS_COMMAND
    modules = [f"framepackd.{stem}" for stem in stems]
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        + "".join(f"import {module}\n" for module in modules)
        + "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the tree cannot be told from what lies about")
    return set(listed.stdout.splitlines())


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


# Folders of which the README names only themselves.
WHOLE_FOLDERS = (
    *("framepack_core/demo_model/", "framepackd/demo/", "tests/golden/", "docs/pictures/"),
    *("training/gallery/", "training/curves/"),
)


def test_the_file_tree_in_the_readme_is_the_tree() -> None:
    block = re.search(r"```text\n(framepack_core/.*?)```", README, re.DOTALL)
    assert block is not None
    told, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0] if line.strip() else ""
        if line.startswith("  ") and name:
            told.add(folder + name)
        elif name.endswith("/") and name not in WHOLE_FOLDERS:
            folder = name
        elif name:
            folder = ""
            told.add(name)
    expected = set()
    for path in tracked():
        whole = next((folder for folder in WHOLE_FOLDERS if path.startswith(folder)), None)
        expected.add(whole or path)
    expected = {path for path in expected if not path.endswith(("__init__.py", "py.typed"))}
    assert told == expected


def commands(group: Group, prefix: str = "framepackd") -> dict[str, Command]:
    found: dict[str, Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


def test_every_command_has_help_and_is_in_the_readme() -> None:
    for name, command in commands(main).items():
        assert command.help, name
        assert name in README, name


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_functions_stay_short_enough_to_read() -> None:
    for package in ("framepack_core", "framepackd"):
        for path in (ROOT / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno <= 80, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_gives_rows_and_measures_nothing_when_imported(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert "rows" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not calls
