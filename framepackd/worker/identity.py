"""Names all that a video's bits depend on: a checkpoint is resumed only where that is the same."""

from typing import Any

from framepack_core.memory import devices
from framepack_core.networks import compiling, fp8
from framepack_core.networks.attention import AUTO
from framepack_core.sampling.magcache import load_ratios
from framepackd.worker.engines import device_of
from framepackd.worker.messages import Work
from framepackd.worker.versions import versions as versions


def of(work: Work, model: str | None) -> dict[str, Any]:
    """Name all that the bits of the video depend on; the fingerprint covers the LoRAs.

    ``model``: the digest of its files; None if nothing is generated any more.
    """
    return {
        "request": work.fingerprint,
        "model": model,
        "device": devices.device_name(device_of(work)),
        "dtype": work.dtype,
        "mag_ratios": _mag_ratios(work),
        **versions(),
    }


def former(work: Work) -> dict[str, Any]:
    """Name the model as former versions did, by its repositories or folders: their checkpoints still fit."""
    sources = (work.spec.transformer, work.spec.base, work.spec.image_encoder)
    return {"model": [str(source) for source in sources]}


def _mag_ratios(work: Work) -> tuple[float, ...]:
    """Return the user's MagCache ratios if this job uses them, else ()."""
    file = work.spec.mag_ratios
    return load_ratios(file) if file is not None and work.request.cache == "magcache" else ()


def computation(work: Work) -> dict[str, str | bool]:
    """Name the chosen way to compute the video: each rounds differently."""
    device = device_of(work)
    dtype, _ = devices.choose_dtypes(device, work.dtype)
    compiled = compiling.decide(
        work.compile,
        device,
        work.sections,
        dtype=dtype,
        precision=work.precision,
        failed=work.uncompiled.get(conditions(work)),
    )
    in_fp8 = {"fp8": fp8.manner(device, dtype)} if work.precision == "fp8" else {}
    return {"precision": work.precision, **in_fp8, "attention": _attention(work), "compiled": compiled}


def conditions(work: Work) -> str:
    """Name the conditions for which a failed compile is remembered: card, versions, dtype and precision."""
    device = device_of(work)
    dtype, _ = devices.choose_dtypes(device, work.dtype)
    return compiling.conditions(device, dtype, work.precision, _attention(work))


def _attention(work: Work) -> str:
    return AUTO if work.attention == "auto" else work.attention
