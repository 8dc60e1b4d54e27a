"""A daemon makes videos with LoRAs, and says what is wrong with one that is of no use."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from framepack_core.models.registry import BUILT_IN
from tests.acceptance.conftest import Daemon
from tests.core.models.loras import make_lora, stored


def record(daemon: Daemon, name: str) -> dict[str, object]:
    told: dict[str, object] = json.loads((daemon.outbox / f"{name}.json").read_text())
    return told


def drop(daemon: Daemon, name: str, settings: str) -> None:
    daemon.drop(name)
    (daemon.inbox / f"{name}.toml").write_text(settings)


def latents(daemon: Daemon, name: str) -> np.ndarray:
    return load_file(daemon.outbox / f"{name}.latents.safetensors")["latents"].numpy()


def test_jobs_with_loras_without_and_with_wrong_ones(daemon: Daemon) -> None:
    folder = daemon.state / "loras"
    folder.mkdir(parents=True)
    make_lora(folder / "style.safetensors", "kohya-hunyuan", stored(BUILT_IN["demo"]))
    save_file({"down_blocks.0.lora_A.weight": torch.ones(2, 2)}, folder / "sd.safetensors")
    keep = "keep_latents = true\n"
    drop(daemon, "plain", keep)
    drop(daemon, "styled", keep + 'loras = [{file = "style.safetensors", weight = 0.8}]\n')
    drop(daemon, "zero", keep)  # after it
    drop(daemon, "wrong", 'loras = [{file = "sd.safetensors"}]\n')
    drop(daemon, "missing", 'loras = ["stile.safetensors"]\n')
    finished = daemon.command("run", "--once")
    assert finished.returncode == 1, finished.stderr

    (entry,) = record(daemon, "styled")["loras"]  # type: ignore[misc] # JSON
    assert (entry["file"], entry["weight"], entry["unmatched"]) == ("style.safetensors", 0.8, 0)
    assert entry["matched"] > 50
    assert len(entry["sha256"]) == 64
    assert record(daemon, "plain")["loras"] == []
    assert not np.array_equal(latents(daemon, "styled"), latents(daemon, "plain"))
    assert np.array_equal(latents(daemon, "zero"), latents(daemon, "plain")), "one worker made all three"

    said = (daemon.failed / "wrong.error.txt").read_text()
    assert "LoRA sd.safetensors does not fit the model" in said
    assert "down_blocks.0.lora_A.weight" in said
    said = (daemon.failed / "missing.error.txt").read_text()
    assert "no stile.safetensors" in said
    assert "there are sd.safetensors, style.safetensors" in said
    shown = daemon.command("show", "styled").stdout
    assert f"style.safetensors, weight 0.8, matched {entry['matched']} of {entry['matched']}" in shown


@pytest.mark.long
def test_a_file_that_changes_before_its_job_runs_fails_it_and_a_retry_takes_the_former_one(
    daemon: Daemon,
) -> None:
    folder = daemon.state / "loras"
    folder.mkdir(parents=True)
    base = stored(BUILT_IN["demo"])
    make_lora(folder / "style.safetensors", "diffusers", base)
    former = (folder / "style.safetensors").read_bytes()
    daemon.start()
    assert daemon.command("pause").returncode == 0
    drop(daemon, "cat", 'loras = ["style.safetensors"]\n')
    daemon.until(lambda: daemon.status()["counts"]["queued"] == 1, "the job to be taken in")
    make_lora(folder / "style.safetensors", "diffusers", base, seed=2)
    assert daemon.command("resume").returncode == 0
    error = daemon.failed / "cat.error.txt"
    daemon.until(error.exists, "the job to fail")
    assert "style.safetensors has changed since the job was taken in" in error.read_text()
    (folder / "style.safetensors").write_bytes(former)
    assert daemon.command("retry", "cat").returncode == 0
    daemon.until((daemon.outbox / "cat.mp4").exists, "the video")
