"""Names of files in a job's work folder that may travel: what a node may change, what it is given."""

import re
from pathlib import Path

from framepackd.jobs.folder import CHECKPOINT, INPUTS, PREVIEW, RESULT, STRIP

MAX_NAME_BYTES = 512  # of a whole name below the work folder; a file system allows 255 of each part
LORAS = "loras"  # in a node's scratch: LORAS/SHA256/NAME

_ASIDE = r"(?:\.aside-[0-9]{1,6})?"
_CLIP = rf"clip-[0-9]{{4,8}}{_ASIDE}"
_FOLDER = rf"{CHECKPOINT}{_ASIDE}(?:/{_CLIP})?"
_CHECKPOINT_FILE = re.compile(rf"{_FOLDER}/(?:state-[0-9]{{8,12}}|(?:latents|segment|edge)-[0-9]{{4,8}})")
_CHECKPOINT_FOLDER = re.compile(_FOLDER)
_RESULT = re.compile(
    rf"{RESULT}/(?:\.mp4|\.section-[0-9]{{1,6}}\.png|(?:\.clip-[0-9]{{1,6}})?\.latents\.safetensors"
    rf"|{re.escape(STRIP)})"
)
_GIVEN_UP = re.compile(rf"{_FOLDER}/given-up")
_PART = r"(?!\.{1,2}(?:/|$))[^/\x00]+"
_INPUT = re.compile(rf"{INPUTS}/{_PART}")
_LORA = re.compile(rf"{LORAS}/[0-9a-f]{{64}}/{_PART}")
PREVIEWS = frozenset({PREVIEW, Path(PREVIEW).with_suffix(".png").name})


class RefusedError(Exception):
    """The other end tells what it never would if all were right; the text says what."""


def is_checkpoint_file(name: str) -> bool:
    """Say whether a name is that of a file that a job resumes from."""
    return _CHECKPOINT_FILE.fullmatch(name) is not None


def is_checkpoint_folder(name: str) -> bool:
    """Say whether a name is that of a checkpoint's folder, a clip's too, in its place or set aside."""
    return _CHECKPOINT_FOLDER.fullmatch(name) is not None


def check_from_node(name: str) -> None:
    """Refuse what no worker writes.

    Raises:
        RefusedError: it is none of a checkpoint's, a result's and a preview's.
    """
    if not (is_checkpoint_file(name) or name in PREVIEWS or _RESULT.fullmatch(name)):
        raise RefusedError(f"{name[:MAX_NAME_BYTES]!r} is no file that a worker writes")


def check_move(source: str, target: str) -> None:
    """Refuse a move that no worker makes: it sets aside what it cannot resume from, or restores it.

    Raises:
        RefusedError: not both are files of checkpoints, or not both are folders of them.
    """
    for fits in (is_checkpoint_file, is_checkpoint_folder):
        if fits(source) and fits(target) and source != target:
            return
    shown = f"{source[:MAX_NAME_BYTES]!r} to {target[:MAX_NAME_BYTES]!r}"
    raise RefusedError(f"{shown} is no move that a worker makes")


def is_for_node(name: str) -> bool:
    """Say whether a file of the work folder, or a LoRA, goes to a node with the job."""
    fits = (_INPUT, _CHECKPOINT_FILE, _GIVEN_UP, _LORA)
    short = len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES
    return short and any(pattern.fullmatch(name) for pattern in fits)


def check_for_node(name: str) -> None:
    """Refuse what no front sends.

    Raises:
        RefusedError: it is no input, no file of a checkpoint and no LoRA.
    """
    if not is_for_node(name):
        raise RefusedError(f"{name[:MAX_NAME_BYTES]!r} is no file that a job brings along")
