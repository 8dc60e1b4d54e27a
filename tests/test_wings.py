"""Wings: who may import whom, as docs/architecture.md says, and that what it names is there."""

import ast
import re
from collections.abc import Iterable, Iterator

import pytest

from tests.crash.victim import PHASE_OF
from tests.wings import (
    AT_IMPORT,
    CORE,
    DAEMON,
    IMPORTS,
    MODULES,
    ROOT,
    TREES,
    Imports,
    rooms,
    wing_of,
    with_torch,
)

PAGE = (ROOT / "docs" / "architecture.md").read_text()
GROUND_FLOOR = {"files", "text", "apart", "problems"}
ABOVE_ALL = {"daemon", "cli", "__main__"}
MOST_ROOMS, MOST_FLOORS = 22, 9


def rules(heading: str) -> dict[str, set[str]]:
    """Read a table of the page: wing -> the wings that it may import."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*)\|$", section, re.MULTILINE)
    return {wing: set(re.findall(r"\w+", allowed)) for wing, allowed in rows}


IN_DAEMON, IN_CORE = rules("Wings of the daemon"), rules("Wings of the core")


def forbidden(imports: Imports) -> list[str]:
    """List the imports that the page does not allow."""
    found = []
    for module, others in imports.items():
        package, wing = module.split(".")[0], wing_of(module)
        for other in others:
            if package == CORE and other.startswith(DAEMON):
                found.append(f"{module} imports {other}")
            if other.split(".")[0] != package or wing_of(other) in (wing, package):
                continue
            if package == DAEMON:
                allowed = GROUND_FLOOR | IN_DAEMON.get(wing, set())
                if wing not in ABOVE_ALL and wing_of(other) not in allowed:
                    found.append(f"{module} imports {other}")
            elif wing in IN_CORE and wing_of(other) in IN_CORE and wing_of(other) not in IN_CORE[wing]:
                found.append(f"{module} imports {other}")
    return found


def test_wings_import_what_the_page_allows() -> None:
    assert not forbidden(IMPORTS)


@pytest.mark.parametrize("wing", sorted(IN_DAEMON))
def test_a_forbidden_import_in_a_wing_of_the_daemon_is_found(wing: str) -> None:
    module = next(name for name in MODULES if wing_of(name) == wing and name.startswith(DAEMON))
    for other in ("framepackd.cli.main", "framepackd.daemon"):
        assert forbidden({**IMPORTS, module: {other}}) == [f"{module} imports {other}"]


@pytest.mark.parametrize("wing", sorted(IN_CORE))
def test_a_forbidden_import_in_a_wing_of_the_core_is_found(wing: str) -> None:
    module = next(name for name in MODULES if wing_of(name) == wing and name.startswith(CORE))
    assert forbidden({module: {"framepackd.files"}})
    above = next((other for other in IN_CORE if other not in (wing, *IN_CORE[wing])), None)
    if above is not None:
        other = next(name for name in MODULES if wing_of(name) == above and name.count(".") == 2)
        assert forbidden({module: {other}}) == [f"{module} imports {other}"]


def test_the_page_names_each_wing() -> None:
    for package, table in ((DAEMON, IN_DAEMON), (CORE, IN_CORE)):
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders - {"cli", "demo_model", "files"} <= table.keys()


def circles(graph: Imports) -> list[list[str]]:
    """Find what imports itself by way of others, by taking away what imports nothing that is left."""
    left = {node: set(others) & graph.keys() for node, others in graph.items()}
    while free := [node for node, others in left.items() if not others & left.keys()]:
        for node in free:
            del left[node]
    return [sorted(left)] if left else []


def floors(graph: Imports) -> int:
    heights: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in heights:
            heights[node] = 1 + max(map(height, graph.get(node, ())), default=0)
        return heights[node]

    return max(map(height, graph))


def test_nothing_imports_itself_by_way_of_others() -> None:
    assert not circles(IMPORTS)
    for package in (DAEMON, CORE):
        assert not circles(rooms(package))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("package", [DAEMON, CORE])
def test_a_package_has_few_rooms_on_few_floors(package: str) -> None:
    found = rooms(package)
    assert len(found) <= MOST_ROOMS
    assert floors(found) <= MOST_FLOORS


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_first_line_of_a_module_says_what_it_is(module: str) -> None:
    said = ast.get_docstring(TREES[module]) or ""
    assert said.split("\n")[0].strip()


def defined(names: Iterable[str], body: list[ast.stmt]) -> bool:
    """Say whether a module or class defines a name, and that one the next."""
    first, *rest = names
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return not rest or (isinstance(node, ast.ClassDef) and defined(rest, node.body))
    return False


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:framepackd|framepack_core)\.[\w.]+)`", PAGE))))
def test_what_the_page_names_exists(name: str) -> None:
    parts = name.split(".")
    module = next(m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in MODULES)
    rest = parts[module.count(".") + 1 :]
    assert not rest or defined(rest, TREES[module].body)


def test_the_crash_harness_names_functions_of_the_daemon() -> None:
    """It tells the phases of a job's life by them: one that is gone would be a phase that is never met."""
    defined_anywhere = {
        node.name
        for module, tree in TREES.items()
        if module.startswith(DAEMON)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert PHASE_OF.keys() <= defined_anywhere


def test_torch_is_imported_in_the_worker_and_by_checks_of_the_machine_only() -> None:
    daemons = {module for module in with_torch(AT_IMPORT) if module.startswith(DAEMON)}
    assert {wing_of(module) for module in daemons} == {"worker", "machine"}
    assert not daemons & {"framepackd.worker.messages", "framepackd.worker.main", "framepackd.machine.check"}


MOST_LINES = {"module": 400, "class": 320, "function": 60}


@pytest.mark.parametrize("kind", MOST_LINES)
def test_nothing_is_longer_than_can_be_read(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"class": ast.ClassDef, "function": ast.FunctionDef}
    lines = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if kind in kinds and isinstance(node, kinds[kind])
    }
    if kind == "module":
        lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    longest = sorted(lines, key=lines.__getitem__)[-3:]
    with capsys.disabled():
        print(f"\nlongest {kind}: {', '.join(f'{name} {lines[name]}' for name in reversed(longest))}")
    assert lines[longest[-1]] <= MOST_LINES[kind]


# What crosses the border of a wing as an open dict: JSON that leaves the program, or has come from outside.
OPEN = {
    "requests and answers of the control socket": {
        "control.client.ask",
        "control.client.change",
        "control.client.perform",
        "control.commands.perform",
        "control.requests.Requests.ask",
        "control.requests.Requests.answer_next",
    },
    "settings, as NAME.toml, NAME.json and the metadata of a video hold them": {
        "jobs.embedded.read",
        "jobs.embedded.settings_of",
        "jobs.job.Job.settings",
        "settings.config.Config.defaults",
        "settings.job_settings.parse_settings",
        "settings.job_settings.read_settings_file",
        "settings.loras.decisive",
    },
    "NAME.json and show --json": {"jobs.job.Job.record", "delivery.results.ResultRecord.inputs"},
}


def open_dicts(package: str) -> Iterator[str]:
    """Name what is public, holds or takes a ``dict[str, Any]``, and is named by a module of another wing."""
    for module, tree in TREES.items():
        if module.startswith(f"{package}."):
            others = "\n".join(
                MODULES[other].read_text()
                for other, imports in IMPORTS.items()
                if module in imports and wing_of(other) != wing_of(module)
            )
            for name, node in public(tree.body):
                if "dict[str, Any]" in ast.unparse(node) and re.search(rf"\b{name.split('.')[-1]}\b", others):
                    yield f"{module.removeprefix(f'{package}.')}.{name}"


def public(body: list[ast.stmt], of: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield public functions by their signature, and public fields by their annotation."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield of + node.name, ast.Tuple([node.args, *([node.returns] if node.returns else [])])
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{of}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield of + node.target.id, node.annotation


@pytest.mark.parametrize("package", [DAEMON, CORE])
def test_only_json_that_leaves_the_program_crosses_a_border_as_an_open_dict(package: str) -> None:
    assert set(open_dicts(package)) <= set().union(*OPEN.values())
