"""The clips of a job: one, or of a chain of frames one for each neighbouring pair, in the order of time."""

from itertools import pairwise
from pathlib import Path

from framepack_core.request import GenerationSettings, Request
from framepackd import loras
from framepackd.database import Job


def clips(job: Job, inputs: Path, lora_dir: Path) -> list[Request]:
    """Say what is to be generated for a job whose files lie in ``inputs``.

    Raises:
        KeyError, ValueError: its settings were made by another version.
    """
    files = {role: inputs / entry["file"] for role, entry in job.inputs.items()}
    frames = [files[f"frame-{number}"] for number in range(job.clips + 1) if "frame-0" in files]
    pairs = list(pairwise(frames)) or [(files["image"], files.get("end"))]
    keyframes = {int(section): inputs / file for section, file in job.settings.get("keyframes", {}).items()}
    sections = job.sections // job.clips
    generation = {key: job.settings[key] for key in GenerationSettings.model_fields}
    merged = loras.requested(job.settings, lora_dir)
    return [
        Request(
            image=image,
            end_image=end,
            prompt=job.settings["prompt"],
            seed=job.settings["seed"],
            loras=merged,
            keyframes={
                section - first: file
                for section, file in keyframes.items()
                if first <= section < first + sections
            },
            **generation,
        )
        for first, (image, end) in zip(range(0, job.sections, sections), pairs, strict=True)
    ]
