"""A job as JSON for another machine: its paths are those below its work folder, wherever that lies."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter, ValidationError

from framepack_core.request import Lora, Request
from framepackd.cluster.inventory import lora_name
from framepackd.cluster.names import LORAS
from framepackd.cluster.node_file import NodeFile
from framepackd.worker.messages import Work

_ADAPTER: TypeAdapter[Work] = TypeAdapter(Work)
_NOWHERE = Path()  # stands for what is the node's own


class LocatedError(Exception):
    """A job cannot be done on another machine, or what describes it is wrong; the text says why."""


def to_json(work: Work, device: str, sha256s: dict[Path, str]) -> bytes:
    """Describe a job for a node.

    Args:
        work: the job on this machine.
        device: the node's name for the device.
        sha256s: the hex SHA-256 of each of its LoRAs.

    Raises:
        LocatedError: a file of it lies neither in its work folder nor among the LoRAs.
    """
    folder = work.result.parent

    def below(path: Path) -> Path:
        if not path.is_relative_to(folder):
            raise LocatedError(f"{path} is not in {folder}: the job cannot leave this machine")
        return path.relative_to(folder)

    located = _relocated(work, below, lambda lora: Path(lora_name(lora.file, sha256s[lora.file])))
    located = replace(
        located,
        device=device,
        compile_cache=_NOWHERE,
        load_lock=_NOWHERE,
        preview_decoder=None,
        mirrored=True,
    )
    described = _ADAPTER.dump_python(located, mode="json") | {"spec": work.spec.name}
    return json.dumps(described, ensure_ascii=False).encode()


def from_json(content: bytes, folder: Path, loras: Path, own: NodeFile) -> Work:
    """Read a job on a node, which does it in a folder of its own.

    Args:
        content: as :func:`to_json` gave it.
        folder: the job's work folder here.
        loras: the folder with what :data:`LORAS` holds.
        own: what is the node's own.

    Raises:
        LocatedError: it is no job, names a model that is not here, or a path outside the folder.
    """

    def below(path: Path) -> Path:
        _refuse_outside(path)
        return folder / path

    try:
        described = json.loads(content)
        spec = own.models[described["spec"]]
        work = _ADAPTER.validate_python(described | {"spec": spec})
    except KeyError as error:
        raise LocatedError(f"model {error} is not set up on this machine") from error
    except (ValueError, TypeError, ValidationError) as error:
        raise LocatedError(f"this is no job of this version: {error}") from error
    located = _relocated(work, below, lambda lora: _below_loras(lora.file, loras))
    return replace(
        located,
        compile_cache=own.cache / "compiled",
        load_lock=own.cache / "load.lock",
        preview_decoder=own.preview_decoder,
    )


def _below_loras(file: Path, loras: Path) -> Path:
    _refuse_outside(file)
    return loras / file.relative_to(LORAS)


def _refuse_outside(path: Path) -> None:
    if path.is_absolute() or ".." in PurePosixPath(path).parts:
        raise LocatedError(f"{path} is outside the job's folder")


def _relocated(work: Work, place: Callable[[Path], Path], of_lora: Callable[[Lora], Path]) -> Work:
    """Put each path of a job in another place."""

    def moved(request: Request) -> Request:
        return request.model_copy(
            update={
                "image": place(request.image),
                "end_image": request.end_image and place(request.end_image),
                "keyframes": {section: place(file) for section, file in request.keyframes.items()},
                "continue_from": request.continue_from and place(request.continue_from),
                "loras": tuple(lora.model_copy(update={"file": of_lora(lora)}) for lora in request.loras),
            }
        )

    continued = work.continued
    return replace(
        work,
        request=moved(work.request),
        following=tuple(map(moved, work.following)),
        result=place(work.result),
        checkpoint=place(work.checkpoint),
        preview=place(work.preview),
        continued=continued
        and replace(
            continued,
            video=str(place(Path(continued.video))),
            folder=str(place(Path(continued.folder))),
        ),
    )
