"""Imported by the process that workers are forked from: the libraries that each would import for itself."""

import ctypes
import importlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

LIBRARIES = (
    "accelerate",
    "av",
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",
    "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack",
    "transformers.models.siglip.image_processing_pil_siglip",
    "transformers.models.siglip.modeling_siglip",
)

if "CRASH_FORKED" in os.environ:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nor does it outlive the daemon
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment] # as in the workers
    for library in LIBRARIES:
        importlib.import_module(library)
