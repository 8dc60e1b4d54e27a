"""Chains, variations and keyframes through a real daemon: what comes out, and what a second drop does."""

import json
import shutil
from pathlib import Path

import pytest

from framepack_core.media.pictures import count_frames
from framepackd.folders import MARKER
from tests.acceptance.conftest import Daemon, MakeDaemon, picture


def drop(daemon: Daemon, root: Path) -> None:
    """Drop one of each, always with the same content."""
    source = root / "source"
    if not source.exists():
        for number in range(3):
            picture(source / f"chain_frame_{number}.png", seed=number)
        (source / "chain.toml").write_text("keep_latents = true\n")
        picture(source / "many.png", seed=5)
        (source / "many.toml").write_text("seeds = 2\nseed = 4294967295\n")
        picture(source / "posed.png", seed=6)
        picture(source / "arms up.png", seed=7)
        (source / "posed.toml").write_text('keyframes = {"0" = "arms up.png"}\n')
        for name in ("chain", "many", "posed"):
            (source / f"{name}.txt").write_text(f"pan left, {name}")
    for path in source.iterdir():
        shutil.copy(path, daemon.inbox)


CHAIN = [f"chain_frame_{number}.png" for number in range(3)]
DELIVERED = {
    *("chain.mp4", "chain.json", "chain.txt", "chain.toml", *CHAIN),
    *("chain.clip-1.latents.safetensors", "chain.clip-2.latents.safetensors"),
    *(f"many_seed_{seed}.{ext}" for seed in (4294967295, 0) for ext in ("mp4", "json", "png", "txt", "toml")),
    *("posed.mp4", "posed.json", "posed.png", "posed.txt", "posed.toml", "posed_section_0.png"),
}


@pytest.mark.long
def test_each_comes_out_whole_and_dropped_again_is_skipped(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(config='on_duplicate = "skip"\nresults_page = false\n')
    drop(daemon, tmp_path)
    assert daemon.command("run", "--once").returncode == 0
    assert {path.name for path in daemon.outbox.iterdir()} == {MARKER, *DELIVERED}
    records = {path.stem: json.loads(path.read_text()) for path in daemon.outbox.glob("*.json")}
    told = {name: (record["clips"], record["sections"], record["seed"]) for name, record in records.items()}
    assert told == {
        "chain": (2, 4, 31337),
        "many_seed_4294967295": (1, 2, 4294967295),
        "many_seed_0": (1, 2, 0),
        "posed": (1, 2, 31337),
    }
    assert records["posed"]["keyframes"] == {"0": "posed_section_0.png"}
    assert records["chain"]["steps_run"] == records["chain"]["steps_total"] == 8
    for name, record in records.items():
        assert count_frames(daemon.outbox / f"{name}.mp4") == record["frames"] == 24 * record["clips"] + 1
    shown = daemon.command("show", "chain", "--json")
    assert json.loads(shown.stdout)["clips"] == 2

    drop(daemon, tmp_path)
    assert daemon.command("run", "--once").returncode == 0
    counts = daemon.status()["counts"]
    assert (counts["done"], counts["skipped"]) == (4, 4)

    for name in DELIVERED:  # as they came out: with the files of a variation, and a keyframe, renamed
        if name.endswith((".png", ".txt", ".toml")):
            (daemon.outbox / name).rename(daemon.inbox / name)
    assert daemon.command("run", "--once").returncode == 0
    counts = daemon.status()["counts"]
    assert (counts["done"], counts["skipped"], counts["waiting"]) == (4, 8, 0)
    assert {path.name for path in daemon.outbox.glob("*.mp4")} == {
        name for name in DELIVERED if name.endswith(".mp4")
    }
