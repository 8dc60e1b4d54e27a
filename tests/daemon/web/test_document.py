"""The scripts that people run, as they are published, against the page with a tiny model.

Changed are addresses and where data sets come from; taken out are lines of the shell and uploads to the hub.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.acceptance.conftest import Daemon, environment, picture
from tests.daemon.web.conftest import Web


@pytest.fixture
def outbox(tiny_daemon: Daemon) -> Path:
    for path in tiny_daemon.outbox.glob("[!.]*"):  # and nothing hidden: its marker stays
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tiny_daemon.outbox


DOCUMENT = Path(__file__).with_name("document.md")
ONE_PICTURE, FOLDER, SKIPPING_FOLDER, FIRST_AND_LAST, PAIRS, FOUR_FRAMES, CHAINS = range(7)


def blocks(url: str, sets: dict[str, str]) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for name, saved in sets.items():
        found = [block.replace(f'load_dataset("svjack/{name}")', f'{{"train": {saved}}}') for block in found]
    lines = [
        [
            line.replace("http://localhost:7860/", url)
            for line in block.splitlines()
            if not line.startswith("git clone") and ".push_to_hub(" not in line
        ]
        for block in found
    ]
    return ["\n".join(block) for block in lines]


def run(block: str, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        cwd=folder,
        env=environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def write_video(path: Path, pictures: list[np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = pictures[0].shape[0], pictures[0].shape[1], "yuv420p"
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def frames(path: Path) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    return folder


def test_one_picture_becomes_a_video_in_the_working_folder(outbox: Path, web: Web, folder: Path) -> None:
    picture(folder / "xiang0.jpg")
    run(blocks(web.url, {})[ONE_PICTURE], folder)
    (video,) = folder.glob("*.mp4")
    assert frames(video) == 289, "10 seconds are 8 sections"
    (record,) = outbox.glob("web/*.json")
    assert video.stem == record.stem


def test_loops_over_folders_make_a_video_for_each_picture(outbox: Path, web: Web, folder: Path) -> None:
    """These two swallow every error: what counts are the files."""
    pictures = folder / "genshin_impact_XINGQIU_images_and_texts/genshin_impact_XINGQIU_images_and_texts"
    second = folder / "Aesthetics_X_Phone_Images_Rec_Captioned_5120x2880"
    for number, path in enumerate((pictures / "a.png", pictures / "b.png", second / "c.png")):
        picture(path, number)
        path.with_suffix(".txt").write_text(f"dances, number {number}\n", encoding="utf-8")
    picture(pictures / "without text.png")
    made = blocks(web.url, {})
    run(made[FOLDER], folder)
    run(made[SKIPPING_FOLDER], folder)
    run(made[SKIPPING_FOLDER], folder)  # finds its texts and makes nothing again
    first_out, second_out = folder / "genshin_impact_XINGQIU_FramePack", folder / "Aesthetics_X_FramePack"
    assert sorted(path.name for path in first_out.iterdir()) == ["a.mp4", "a.txt", "b.mp4", "b.txt"]
    assert sorted(path.name for path in second_out.iterdir()) == ["c.mp4", "c.txt"]
    assert [frames(path) for path in (*first_out.glob("*.mp4"), *second_out.glob("*.mp4"))] == [145] * 3
    assert len({path.read_bytes() for path in first_out.glob("*.mp4")}) == 2, "each its own"
    assert len(list(outbox.glob("web/*.mp4"))) == 3


def test_first_and_last_frames_become_a_data_set_and_that_becomes_videos(
    outbox: Path, web: Web, folder: Path
) -> None:
    videos = folder / "Lelouch_Vi_Britannia_Videos_Captioned"
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(2)]
    write_video(videos / "still.mp4", [noise[0]] * 12)
    write_video(videos / "jump.mp4", [noise[0]] * 6 + [noise[1]] * 6)
    for name in ("still", "jump"):
        (videos / f"{name}.txt").write_text(f"it stands {name}")
    name = "Lelouch_Vi_Britannia_First_Last_Frame_Diff_Captioned"
    # On the hub its columns are pictures: it is cast when it is uploaded, not when it is saved.
    columns = "".join(f'.cast_column("{column}", HfImage())' for column in ("first_frame", "last_frame"))
    loading = f'load_from_disk("{folder / "lelouch_dataset"}"){columns}'
    made = blocks(web.url, {name: loading})
    made[PAIRS] = f"from datasets import Image as HfImage, load_from_disk\n{made[PAIRS]}"
    run(made[FIRST_AND_LAST], folder)
    saved = folder / "Lelouch_Vi_Britannia_First_Last_Frame_Captioned_saved"
    assert {
        f"{name}_{what}" for name in ("still", "jump") for what in ("first_frame.png", "frame_diff.txt")
    } <= {path.name for path in saved.iterdir()}
    run(made[PAIRS], folder)
    out = folder / "Lelouch_Vi_Britannia_FramePack_First_Last_Frame_Video_Captioned"
    (video,), (text,) = out.glob("*.mp4"), out.glob("*.txt")
    assert video.stem == text.stem, "it is named after the file the server gave"
    assert text.read_text() == "it stands still", "the other one differs by more than 0.9"
    assert frames(video) == 73
    assert len(list(outbox.glob("web/*_end.png"))) == 1
    assert len(list(outbox.glob("web/*.section-*.png"))) == 2, "save_section_frames"


def test_four_frames_of_each_video_become_a_data_set_and_that_becomes_longer_videos(
    web: Web, folder: Path
) -> None:
    shades = [np.full((48, 64, 3), shade, np.uint8) for shade in np.linspace(30, 220, 16).astype(int)]
    write_video(folder / "Yi_Chen_Dancing_Animation_Videos/dance.mp4", shades)
    name = "Yi_Chen_Dancing_Animation_Frames_4"
    made = blocks(web.url, {name: f'load_from_disk("{folder / "yi_chen_dancing_dataset"}")'})
    made[CHAINS] = f"from datasets import load_from_disk\n{made[CHAINS]}"
    run(made[FOUR_FRAMES], folder)
    extracted = sorted(path.name for path in (folder / "extracted_frames").iterdir())
    assert extracted == [f"dance_frame_{number}.png" for number in range(4)]
    assert Image.open(folder / "extracted_frames/dance_frame_3.png").getpixel((5, 5)) != Image.open(
        folder / "extracted_frames/dance_frame_0.png"
    ).getpixel((5, 5))
    run(made[CHAINS], folder)
    (video,) = (folder / "Yi_Chen_Dancing_Animation_FramePack_Frames_4_Videos").glob("video_*.mp4")
    assert abs(frames(video) - 3 * 73) <= 3, "three clips, joined by moviepy, which counts by time"
