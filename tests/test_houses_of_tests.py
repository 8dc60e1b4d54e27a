"""Tests lie where what they test lies, share what they need by modules of its own, and use what is public."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.wings import CORE, DAEMON, ROOT, TREES

TESTS = sorted((ROOT / "tests").rglob("*.py"))


@cache  # when it is wanted: every process of the tests imports this module
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize(("package", "folder"), [(DAEMON, "daemon"), (CORE, "core")])
def test_each_wing_has_its_tests_and_each_folder_of_tests_its_wing(package: str, folder: str) -> None:
    wings = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    tested = {path.parent.name for path in (ROOT / "tests" / folder).glob("*/test_*.py")}
    assert tested == wings


def imported_tests(tree: ast.Module) -> list[str]:
    """Name the modules of tests that something is imported from."""
    found = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [name for name in found if name.startswith("tests.") and name.split(".")[-1].startswith("test_")]


def test_what_tests_share_has_a_module_of_its_own() -> None:
    assert not {str(path): found for path in TESTS if (found := imported_tests(tree_of(path)))}
    assert imported_tests(ast.parse("from tests.core.test_engine import run")) == ["tests.core.test_engine"]


@cache
def private_names() -> set[str]:
    """Collect what our modules define for themselves: functions, classes, constants, attributes."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if re.match(r"_[A-Za-z]", name)}


def own_names(tree: ast.Module) -> set[str]:
    """Collect what a test module defines and may use, private or not."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value))
    }


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def reached_into(tree: ast.Module) -> Iterator[str]:
    """Name the private parts of ours that a test uses: as attribute, import, patched name or code to run."""
    names = private_names() - own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.ImportFrom):
            ours = (node.module or "").split(".")[0] in (DAEMON, CORE)
            yield from (
                f"line {node.lineno}: {a.name}" for a in node.names if ours and a.name.startswith("_")
            )
        elif isinstance(node, ast.Call):
            for given in node.args:
                if isinstance(given, ast.Constant) and str(given.value).split(".")[-1] in names:
                    yield f"line {given.lineno}: {given.value!r}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            yield from (f"line {node.lineno}: {name}" for name in re.findall(r"\w\.(_[a-z]\w*)", node.value))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(Path(path).relative_to(ROOT)))
def test_tests_use_what_is_public(path: Path) -> None:
    assert not list(reached_into(tree_of(path)))


def test_what_is_private_is_found_however_it_is_reached() -> None:
    name = next(name for name in private_names() if name[1].islower())
    for text in (
        f"job.{name}()",
        f"from framepackd.daemon import {name}",
        f"patch.setattr(daemon, '{name}', 1)",
        f"'import daemon; daemon.{name}()'",
    ):
        assert list(reached_into(ast.parse(text)))
