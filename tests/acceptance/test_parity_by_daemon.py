"""What the daemon delivers is what the engine makes of the same request, byte for byte.

The engine is held against the reference elsewhere; here every setting has to find its way to it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framepack_core.engine import Clip, Engine
from framepack_core.media.pictures import write_picture
from framepack_core.media.segments import encode, join
from framepack_core.request import Request
from framepack_core.sections import chronological
from tests.acceptance.conftest import MakeDaemon, picture
from tests.golden import TINY_MODELS

MODELS = f"""
[models.tiny]
kind = "framepack"
transformer = "{TINY_MODELS}/framepack-i2v"
base = "{TINY_MODELS}/hunyuanvideo"
image_encoder = "{TINY_MODELS}/flux_redux"
[models.tiny-f1]
kind = "f1"
transformer = "{TINY_MODELS}/framepack-f1"
base = "{TINY_MODELS}/hunyuanvideo"
image_encoder = "{TINY_MODELS}/flux_redux"
"""
SHARED: dict[str, Any] = {
    "seconds": 3.0,
    "latent_window_size": 4,
    "steps": 5,
    "width": 64,
    "height": 48,
    "seed": 7,
}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"model": "tiny"},
    "forward": {"model": "tiny-f1", "cache": "teacache", "steps": 9, "latent_window_size": 1, "seconds": 1},
    "guided": {
        "model": "tiny",
        "true_cfg_scale": 2.5,
        "guidance_scale": 6.5,
        "guidance_rescale": 0.3,
        "negative_prompt": "blurry",
        "end": True,
    },
}


@pytest.mark.long
def test_the_daemon_delivers_what_the_engine_makes(
    make_daemon: MakeDaemon, tiny_engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    daemon = make_daemon(models=MODELS)
    for name, settings in JOBS.items():
        own = SHARED | settings | {"crf": 0, "save_section_frames": True, "embed_metadata": False}
        if own.pop("end", False):
            picture(daemon.inbox / f"{name}_end.png", seed=1, size=(90, 30))
        daemon.drop(name, prompt="A girl, dancing.", **own)
    assert daemon.command("run", "--once").returncode == 0, daemon.command("status").stdout

    for name, settings in JOBS.items():
        generation = SHARED | {key: value for key, value in settings.items() if key not in ("model", "end")}
        request = Request(
            image=daemon.outbox / f"{name}.png",
            end_image=daemon.outbox / f"{name}_end.png" if "end" in settings else None,
            prompt="A girl, dancing.",
            **generation,
        )
        engine = tiny_engine("framepack-f1" if settings["model"] == "tiny-f1" else "framepack-i2v")
        clips = [event for event in engine.generate(request) if isinstance(event, Clip)]
        segments = [encode(clip.frames, size=(48, 64), crf=0) for clip in clips]
        frames = join(tmp_path / "v.mp4", chronological(engine.models.spec.kind, segments))
        assert (tmp_path / "v.mp4").read_bytes() == (daemon.outbox / f"{name}.mp4").read_bytes(), name
        for clip in clips:
            write_picture(tmp_path / "still.png", clip.still)
            still = daemon.outbox / f"{name}.section-{clip.section}.png"
            assert (tmp_path / "still.png").read_bytes() == still.read_bytes(), still.name
        record = json.loads((daemon.outbox / f"{name}.json").read_text())
        assert record["frames"] == frames
        assert record["steps_run"] == record["steps_total"] == request.steps * len(clips)
