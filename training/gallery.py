"""Draw the gallery of the README: every motion the demo model knows, on the bundled pictures in turn.

    python -m training.gallery docs/pictures

The pictures take turns in the order of their names, always with the same seed; only what plays is chosen.
"""

from importlib.resources import files
from pathlib import Path

import click
import torch
from PIL import Image, ImageDraw

from framepack_core.models.registry import BUILT_IN
from training.evaluate import engine_for, make, to_pixels
from training.motions import MOTIONS
from training.pictures import to_tensor

PICTURES = (
    Path(str(files("framepackd") / "demo/lake.png")),
    *sorted((Path(__file__).parent / "gallery").glob("*.png")),
)
COLUMNS = (0, 12, 24, 36, 48, 60, 72)  # frames
CELL, GAP, LABEL = 112, 4, 104
MOVING = ("night falls", "fog", "sunset", "pan right")  # what the model is best at, then a camera
EVERY = 2  # frames of the moving picture


def prompt_of(motion: str) -> str:
    """Say a motion as people would."""
    return motion if motion.endswith("falls") else f"{motion}, smooth motion"


def square(frame: torch.Tensor, size: int) -> Image.Image:
    """Give the middle of a frame (3, H, W), (size, size)."""
    picture = Image.fromarray(to_pixels(frame))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def sheet(videos: dict[str, torch.Tensor]) -> Image.Image:
    """Lay some frames of each video side by side."""
    width = LABEL + len(COLUMNS) * (CELL + GAP)
    drawn = Image.new("RGB", (width, len(videos) * (CELL + GAP)), "white")
    write = ImageDraw.Draw(drawn)
    for row, (motion, video) in enumerate(videos.items()):
        top = row * (CELL + GAP)
        write.text((6, top + CELL // 2 - 6), motion, fill="black", font_size=12)
        for column, frame in enumerate(COLUMNS):
            drawn.paste(square(video[frame], CELL), (LABEL + column * (CELL + GAP), top))
    return drawn


def moving(videos: dict[str, torch.Tensor]) -> list[Image.Image]:
    """Put some of the videos beside each other, to be played."""
    size = 176
    frames = []
    for number in range(0, 73, EVERY):
        frame = Image.new("RGB", (len(MOVING) * (size + GAP) - GAP, size), "white")
        for column, motion in enumerate(MOVING):
            frame.paste(square(videos[motion][number], size), (column * (size + GAP), 0))
        frames.append(frame)
    return frames


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="A model's folder; else the bundled one.")
@click.option("--size", default=192)
def main(folder: Path, model: Path | None, size: int) -> None:
    """Write demo-motions.webp, a sheet, and demo-moving.webp, which plays."""
    bundled = BUILT_IN["demo"].transformer.folder
    engine = engine_for(model or bundled.parent, "f1")
    pictures = [to_tensor(square_picture(path, size)).float() / 127.5 - 1 for path in PICTURES]
    videos = {
        motion: make(engine, pictures[number % len(pictures)], prompt_of(motion), 2)
        for number, motion in enumerate(MOTIONS)
    }
    folder.mkdir(parents=True, exist_ok=True)
    sheet(videos).save(folder / "demo-motions.webp", quality=82)
    first, *others = moving(videos)
    first.save(
        folder / "demo-moving.webp",
        save_all=True,
        append_images=others,
        duration=33 * EVERY,
        loop=0,
        quality=60,
    )


def square_picture(path: Path, size: int) -> Image.Image:
    """Give the middle of a picture."""
    with Image.open(path) as picture:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        cut = picture.convert("RGB").crop((left, top, left + side, top + side))
    return cut.resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
