"""A real daemon makes a finished video longer, and is killed in the middle of it."""

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from framepack_core.media.pictures import count_frames
from framepack_core.models.registry import BUILT_IN
from tests.acceptance.conftest import MakeDaemon

DEMO = BUILT_IN["demo"]
FORWARD = (
    f'[models.forward]\nkind = "f1"\ntransformer = "{DEMO.transformer}"\nbase = "{DEMO.base}"\n'
    f'image_encoder = "{DEMO.image_encoder}"\n'
)
SET = ("cat.png", "cat.txt", "cat.json", "cat.latents.safetensors", "cat.mp4")


def latents(path: Path) -> torch.Tensor:
    return safetensors.torch.load_file(path)["latents"]


@pytest.mark.long
def test_the_set_from_the_outbox_becomes_longer_as_if_it_had_been_asked_for_at_once(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon(models=FORWARD)
    made = {"model": "forward", "keep_latents": True, "seed": 5, "steps": 30}
    daemon.drop("long", seconds=2.0, **made)
    daemon.drop("cat", seconds=1.2, **made)
    daemon.start()
    daemon.until(lambda: daemon.status()["counts"]["done"] == 2, "both videos")
    sections = json.loads((daemon.outbox / "long.json").read_text())["sections"]
    short = json.loads((daemon.outbox / "cat.json").read_text())["sections"]
    assert (short, sections) == (3, 5)
    (daemon.outbox / "cat.toml").unlink()
    for name in SET:
        (daemon.outbox / name).rename(daemon.inbox / name)
    (daemon.inbox / "cat.txt").unlink()  # the prompt stands in NAME.json, too
    picture_waits = "more = 3.0 in cat.toml"
    (daemon.inbox / "cat.png").rename(daemon.root / "cat.png")
    waits = daemon.status
    daemon.until(lambda: any(picture_waits in w["missing"] for w in waits()["waiting"]), "it to wait")
    (daemon.root / "cat.png").rename(daemon.inbox / "cat.png")
    (daemon.inbox / "cat.toml").write_text("more = 1.0\n")  # of 0.4 s two sections, half to even

    sampled = "jobs/*/checkpoint/latents-0000"
    daemon.until(lambda: any(daemon.state.glob(sampled)), "the first section")
    daemon.stop(signal.SIGKILL)
    (daemon.state / "control.sock").unlink()
    daemon.start()
    daemon.until(lambda: daemon.status()["counts"]["done"] == 3, "the longer video")
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert (record["frames"], record["sections"], record["continues"]["frames"]) == (61, 2, 37)
    assert (record["prompt"], record["seed"], record["model"]) == ("pan left", 5, "forward")
    assert record["resumes"] >= 1, "it was killed on the way"
    assert count_frames(daemon.outbox / "cat.mp4") == 61
    assert torch.equal(*(latents(daemon.outbox / f"{name}.latents.safetensors") for name in ("cat", "long")))
    assert count_frames(daemon.outbox / "cat.source.mp4") == 37
