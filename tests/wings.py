"""The modules of both packages, and who imports whom, read from their text."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

DAEMON, CORE = "framepackd", "framepack_core"

Imports = Mapping[str, set[str]]  # module -> the modules of ours that it imports, anywhere in it


def modules() -> dict[str, Path]:
    found = {}
    for package in (DAEMON, CORE):
        for path in (ROOT / package).rglob("*.py"):
            if "demo_model" not in path.parts:
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
    return found


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}

# Anywhere in a module; and when it is imported itself.
IMPORTS: Imports = {
    module: (imported_by(ast.walk(tree)) & MODULES.keys()) - {module} for module, tree in TREES.items()
}

AT_IMPORT: Imports = {module: imported_by(tree.body) for module, tree in TREES.items()}


def wing_of(module: str) -> str:
    """Give the wing, or the module beside the wings; the package's own ``__init__`` is its name."""
    return module.split(".")[1] if "." in module else module


def rooms(package: str) -> dict[str, set[str]]:
    """Give the wings and modules of a package's top folder, each with those that it imports."""
    found: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        if module.startswith(f"{package}."):
            own = found.setdefault(wing_of(module), set())
            own |= {wing_of(other) for other in others if other.startswith(f"{package}.")} - {wing_of(module)}
    return found


TORCH = {"torch", "diffusers", "transformers", "accelerate"}


def with_torch(imports: Imports) -> set[str]:
    """Name the modules that import torch when they are imported."""
    found = {module for module, names in imports.items() if {name.split(".")[0] for name in names} & TORCH}
    while more := {module for module, names in imports.items() if names & found} - found:
        found |= more
    return found
