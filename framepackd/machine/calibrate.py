"""framepackd calibrate: measures the MagCache ratios of a user's own model."""

import json
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress

from framepack_core import __version__
from framepack_core.engine import Engine
from framepack_core.errors import ModelError
from framepack_core.memory import devices
from framepack_core.request import GenerationSettings, Request
from framepack_core.sampling.magcache import skipped_steps
from framepackd.settings.config import Config
from framepackd.supervisor.readiness import is_gpu_expected

DEMO = files("framepackd").joinpath("demo")


def calibrate(config: Config, model: str, picture: Path | None, prompt: str | None, output: Path) -> str:
    """Compute a section with all blocks and write the ratios as JSON; returns what to do with them.

    Size, steps and the other settings are the config's defaults: calibrate as you generate.

    Raises:
        FramePackError: the model is unknown or not here, or the picture cannot be used.
        OSError: the file cannot be written.
    """
    if model not in config.model_names():
        raise ModelError(config.unknown_model(model))
    request = Request.model_validate(
        {
            "image": picture or Path(str(DEMO.joinpath("lake.png"))),
            **{
                key: value for key, value in config.defaults.items() if key in GenerationSettings.model_fields
            },
            "prompt": prompt or DEMO.joinpath("lake.txt").read_text(encoding="utf-8").strip(),
        }
    )
    device = devices.choose_device(config.gpu.devices[0], gpu_expected=is_gpu_expected(model, config))
    engine = Engine.load(config.spec(model), str(device), config.gpu.dtype, config.gpu.precision)
    measuring = engine.calibrate(request)
    ratios: list[float] = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task(f"calibrating {model}", total=request.steps)
        while not ratios:
            try:
                next(measuring)
            except StopIteration as stopped:
                ratios = stopped.value
            progress.advance(task)
    skipped = len(skipped_steps(ratios, request.steps))
    record = {
        "ratios": ratios,
        "model": model,
        "transformer": str(engine.models.spec.transformer),
        "steps": request.steps,
        "device": devices.device_name(engine.device),
        "versions": {"framepackd": __version__, "torch": torch.__version__},
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    output.write_text(json.dumps(record, indent=2) + "\n")
    return (
        f"{output} is written: with it MagCache skips {skipped} of {request.steps} steps. To use it, put\n"
        f'  mag_ratios = "{output.absolute()}"\nunder [models.{model}] in the config, '
        'and cache = "magcache" in [defaults] or in a job\'s NAME.toml.'
    )
