"""The photographs to train and to measure with, public domain or CC0 only: pictures.toml names them.

    python -m training.pictures FOLDER [--git OWNER/NAME=GIT_DIR ...]

fetches them, checks what came, and keeps each with a short side of 384 pixels. From GitHub, or from a local
copy of a repository; those of scikit-image come with the package.
"""

import hashlib
import subprocess
import tomllib
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import click
import skimage
import torch
from PIL import Image

SHORT_SIDE = 384
LIST = Path(__file__).parent / "pictures.toml"


@dataclass(frozen=True)
class Source:
    """Where a picture is from."""

    name: str
    repository: str
    commit: str
    path: str
    licence: str
    held_out: bool
    sha256: str


def sources() -> list[Source]:
    """Read the list."""
    collections = tomllib.loads(LIST.read_text())["collection"]
    return [
        Source(
            name=f"{collection['prefix']}-{Path(path).stem.replace(' ', '-').lower()}",
            repository=collection["repository"],
            commit=collection["commit"],
            path=path,
            licence=collection["licence"],
            held_out=path in collection["held_out"],
            sha256=sha256,
        )
        for collection in collections
        for path, sha256 in collection["pictures"].items()
    ]


def content(source: Source, copies: dict[str, Path]) -> bytes:
    """Get a picture's file."""
    if source.repository == "scikit-image/scikit-image":
        return (Path(skimage.__file__).parent / source.path).read_bytes()
    if source.repository in copies:
        command = ["git", "--git-dir", str(copies[source.repository]), "show"]
        return subprocess.run(  # noqa: S603 - the list names what is shown
            [*command, f"{source.commit}:{source.path}"], check=True, capture_output=True
        ).stdout
    url = f"https://raw.githubusercontent.com/{source.repository}/{source.commit}/{quote(source.path)}"
    with urllib.request.urlopen(url) as answer:
        found: bytes = answer.read()
    return found


def keep(source: Source, found: bytes, folder: Path) -> None:
    """Write a picture down, smaller."""
    if hashlib.sha256(found).hexdigest() != source.sha256:
        raise click.ClickException(f"{source.path} of {source.repository} is not what it was")
    picture = Image.open(BytesIO(found)).convert("RGB")
    scale = SHORT_SIDE / min(picture.size)
    size = round(scale * picture.width), round(scale * picture.height)
    picture.resize(size, Image.Resampling.LANCZOS).save(folder / f"{source.name}.png")


def load(folder: Path, *, held_out: bool) -> dict[str, torch.Tensor]:
    """Give the pictures of one kind by name: (3, H, W), uint8."""
    wanted = [source.name for source in sources() if source.held_out == held_out]
    return {name: to_tensor(Image.open(folder / f"{name}.png")) for name in wanted}


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Give a picture as (3, H, W), uint8."""
    flat = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--git", "copies", multiple=True, metavar="OWNER/NAME=GIT_DIR")
def main(folder: Path, copies: Sequence[str]) -> None:
    """Fetch all pictures into FOLDER."""
    local = {name: Path(path) for name, _, path in (copy.partition("=") for copy in copies)}
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources():
        if not (folder / f"{source.name}.png").exists():
            keep(source, content(source, local), folder)
            click.echo(f"{source.name}: {source.licence}")


if __name__ == "__main__":
    main()
