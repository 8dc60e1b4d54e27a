"""The file that tells a node what is its own: its models, its caches, the folder that it works in."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from framepack_core.models.registry import ModelSpec
from framepackd import files

FILE = "FRAMEPACKD_NODE"  # the environment variable that names the file


class NodeFileError(Exception):
    """The file is missing, or is not what ``framepackd node`` writes; the text says what to do."""


@dataclass(frozen=True)
class NodeFile:
    """What is a node's own, wherever its jobs come from."""

    models: Mapping[str, ModelSpec]  # by the names that jobs call them
    scratch: Path  # folder for the work folders of its jobs, nothing else
    cache: Path  # folder for compiled kernels and locks
    preview_decoder: Path | None = None  # weights of a tiny decoder


_ADAPTER: TypeAdapter[NodeFile] = TypeAdapter(NodeFile)


def write_node_file(path: Path, own: NodeFile) -> None:
    """Write the file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    files.write_json(path, _ADAPTER.dump_python(own, mode="json"))


def read_node_file(environment: Mapping[str, str] = os.environ) -> NodeFile:
    """Read the file that the environment names.

    Raises:
        NodeFileError: it is missing, or not what is expected.
    """
    path = environment.get(FILE)
    if path is None:
        raise NodeFileError(f"{FILE} is not set: start this machine's part with framepackd node")
    try:
        return _ADAPTER.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise NodeFileError(f"{path} cannot be read ({error.strerror}): restart framepackd node") from error
    except ValidationError as error:
        raise NodeFileError(
            f"{path} is damaged ({error}): restart framepackd node, which writes it"
        ) from error
