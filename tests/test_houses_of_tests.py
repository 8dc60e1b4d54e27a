"""Tests lie where what they test lies, and share what they need by modules of its own."""

import ast

import pytest

from tests.wings import CORE, DAEMON, ROOT

TESTS = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}


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
    assert not {str(path): found for path, tree in TESTS.items() if (found := imported_tests(tree))}
    assert imported_tests(ast.parse("from tests.core.test_engine import run")) == ["tests.core.test_engine"]
