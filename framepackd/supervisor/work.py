"""Describes a job for the worker: its clips in the order of time, its folders, its device."""

from itertools import pairwise
from pathlib import Path

from framepack_core.models.registry import BUNDLED
from framepack_core.request import WHITE, GenerationSettings, Request, TimedPrompt
from framepack_core.sections import FPS
from framepackd.jobs import embedded
from framepackd.jobs import folder as work_folder
from framepackd.jobs.folder import CONTINUED, INPUTS
from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.settings import loras
from framepackd.settings.config import Config
from framepackd.supervisor import readiness
from framepackd.worker import messages
from framepackd.worker.source_video import START, TAIL, Continued


def work_of(
    job: Job, config: Config, store: JobStore, *, gpu_used: bool, may_be_ahead: bool
) -> messages.Work:
    """Describe a job for the worker.

    Raises:
        KeyError, ValueError: its settings do not fit the configuration any more.
    """
    folder = config.jobs_dir / job.id
    request, *following = clips(job, folder / work_folder.INPUTS, config.lora_dir)
    return messages.Work(
        job_id=job.id,
        request=request,
        following=tuple(following),
        spec=config.spec(job.settings["model"]),
        fingerprint=job.fingerprint,
        result=folder / work_folder.RESULT,
        checkpoint=folder / work_folder.CHECKPOINT,
        preview=folder / work_folder.PREVIEW,
        sections=job.sections,
        frames=job.frames,
        size=(job.height, job.width),
        crf=job.settings["crf"],
        tags=embedded.tags(job, config.spec(job.settings["model"])),
        save_section_frames=job.settings["save_section_frames"],
        keep_latents=job.settings.get("keep_latents", False),
        device=config.gpu.device,
        dtype=config.gpu.dtype,
        precision=config.gpu.precision,
        levels=store.levels(),
        attention=config.gpu.attention,
        compile=config.gpu.compile,
        uncompiled=store.uncompiled(),
        compile_cache=config.cache_dir / "compiled",
        gpu_expected=job.settings["model"] not in BUNDLED and (gpu_used or readiness.gpu_seen()),
        vae_tiling=config.gpu.vae_tiling,
        keep_free=int((job.settings.get("gpu_memory_preservation") or 0) * 2**30),
        keep_only=job.cancel is not None,
        preview_decoder=config.preview_decoder,
        filmstrip=config.results_page,
        continued=continued(job, folder),
        ahead=may_be_ahead,
    )


def clips(job: Job, inputs: Path, lora_dir: Path) -> list[Request]:
    """Give the request of each clip of a job whose files lie in ``inputs``, in its work folder.

    Raises:
        KeyError, ValueError: its settings were made by another version.
    """
    files = {role: inputs / str(entry["file"]) for role, entry in job.inputs.items()}
    apart = ("prompts", "background")
    generation = {key: job.settings[key] for key in GenerationSettings.model_fields if key not in apart}
    generation["background"] = job.settings.get("background", WHITE)  # older jobs have none
    generation |= {"prompt": job.settings["prompt"], "seed": job.settings["seed"]}
    generation["loras"] = loras.requested(job.settings, lora_dir)
    source = continued(job, inputs.parent)
    if source is not None:
        folder = Path(source.folder)
        generation["seconds"] = job.settings["more"]
        return [
            Request(
                image=files.get("image", folder / START),
                prompts=_prompts(job, range(job.sections), source.frames - 1),
                continue_from=files.get("latents", folder / TAIL),
                **generation,
            )
        ]
    frames = [files[f"frame-{number}"] for number in range(job.clips + 1) if "frame-0" in files]
    pairs: list[tuple[Path, Path | None]] = [*pairwise(frames)] or [(files["image"], files.get("end"))]
    keyframes = {int(section): inputs / file for section, file in job.settings.get("keyframes", {}).items()}
    sections = job.sections // job.clips
    section = 4 * job.settings["latent_window_size"]  # frames
    return [
        Request(
            image=image,
            end_image=end,
            prompts=_prompts(job, range(first, first + sections), first * section),
            keyframes={
                section - first: file
                for section, file in keyframes.items()
                if first <= section < first + sections
            },
            **generation,
        )
        for first, (image, end) in zip(range(0, job.sections, sections), pairs, strict=True)
    ]


def _prompts(job: Job, sections: range, before: int) -> tuple[TimedPrompt, ...]:
    """Give the timed prompts that act in ``sections``, with times that count from frame ``before``."""
    asked = job.settings.get("more") or job.settings["seconds"]
    length = max((len(sections) * 4 * job.settings["latent_window_size"] + 1) / FPS, asked)
    return tuple(
        TimedPrompt(
            start=max(timed["from"] - before / FPS, 0.0),
            end=min(timed["to"] - before / FPS, length),
            text=timed["text"],
        )
        for timed in job.settings.get("prompts", [])  # older jobs have none
        if any(section in sections for section in timed["sections"])
    )


def continued(job: Job, work: Path) -> Continued | None:
    """Describe the video that a job extends; None if it extends none."""
    source = job.settings.get("continues")
    if source is None:
        return None
    return Continued(
        video=str(work / INPUTS / source["file"]),
        folder=str(work / CONTINUED),
        frames=source["frames"],
        latents=source["latents"],
        window=job.settings["latent_window_size"],
        size=(job.height, job.width),
        crf=job.settings["crf"],
        ours="record" in job.inputs,
    )
