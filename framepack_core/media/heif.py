"""Decodes HEIC and HEIF, the format of iPhone photos, in a process of its own.

Needs pi-heif, from the extra ``heif``. libheif parses untrusted files, so it runs neither in the daemon nor
in the worker, but in a process with limited memory and time.
"""

import importlib.util
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from framepack_core.errors import RequestError
from framepack_core.media.sizes import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".heic", ".heif", ".hif")
HEAD_BYTES = 64  # hold the first box with its brands
BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AVIF_BRANDS = {b"avif", b"avis"}
DECODE_SECONDS = 12  # 48 megapixels take 2 s
MEMORY_BYTES = 2 << 30  # address space of the process
MODES = ("L", "LA", "RGB", "RGBA")

NAME = "this is HEIC, from an iPhone or another camera"
AS_JPEG = (
    "save it as JPEG and drop that (on the phone, Settings > Camera > Formats > Most Compatible has it "
    "take JPEGs)"
)
NOT_HERE = (
    f"{NAME}, which cannot be read here: {AS_JPEG}, or install its reader: pip install 'framepackd[heif]' "
    "and start framepackd again"
)


def available() -> bool:
    """Return whether pi-heif is installed."""
    return importlib.util.find_spec("pi_heif") is not None


def is_heif(head: bytes) -> bool:
    """Return whether a file that begins with these ``HEAD_BYTES`` is HEIC or HEIF, but not AVIF.

    >>> is_heif(b"....ftypheic........"), is_heif(b"....ftypavif....mif1")
    (True, False)
    """
    if head[4:8] != b"ftyp":
        return False
    length = int.from_bytes(head[:4], "big")
    brands = {head[at : at + 4] for at in (8, *range(16, min(length, len(head)), 4))}
    return not brands & AVIF_BRANDS and bool(brands & BRANDS or head[8:12] in (b"mif1", b"msf1"))


def decode(path: Path) -> "Image":
    """Decode a picture, upright; its ``info`` holds its colour profile under ``icc_profile``.

    Raises:
        RequestError: it is damaged or too large, or pi-heif is not installed.
    """
    from PIL import Image

    if not available():
        raise RequestError(f"{path.name}: {NOT_HERE}")
    command = [sys.executable, "-m", "framepack_core.media.heif", str(path)]
    process = subprocess.run(  # noqa: S603 - this module
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    if process.returncode == -signal.SIGALRM:
        fault = f"takes more than {DECODE_SECONDS} s to decode"
    elif process.returncode != 0:
        fault = f"breaks its decoder (exit code {process.returncode})"
    else:
        header, _, pixels = process.stdout.partition(b"\n")
        answer = json.loads(header)
        if "error" not in answer:
            mode, profile = answer["mode"], answer["profile"]
            image = Image.frombuffer(mode, tuple(answer["size"]), pixels, "raw", mode, 0, 1)
            image.info = {"icc_profile": bytes.fromhex(profile)} if profile else {}
            return image
        fault = answer["error"]
    raise RequestError(f"{path.name}: {NAME}, and {fault}: {AS_JPEG}")


def _main(path: Path) -> None:
    """Write a picture's mode, size and profile as a line of JSON, then its pixels."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the parent decides when this process ends
        signal.signal(ignored, signal.SIG_IGN)
    signal.alarm(DECODE_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pi_heif

    pi_heif.options.DECODE_THREADS = 1  # each thread reserves address space
    try:
        found = pi_heif.open_heif(path)
        width, height = found.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has more than {MAX_PIXELS // 10**6} megapixels")  # noqa: TRY301 - sent below
        image = found.to_pillow()
        image = image if image.mode in MODES else image.convert("RGBA")
        pixels = image.tobytes()
    except Exception as error:  # a damaged file can make it raise anything
        print(json.dumps({"error": f"cannot be read ({error or type(error).__name__})"}))
        return
    profile = (found.info.get("icc_profile") or b"").hex()
    print(json.dumps({"mode": image.mode, "size": image.size, "profile": profile}), flush=True)
    sys.stdout.buffer.write(pixels)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
