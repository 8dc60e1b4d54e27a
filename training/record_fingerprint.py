"""Record what the demo model makes, for framepackd sanity-check; to be run anew when the demo model changes.

    python training/record_fingerprint.py [FILE]

FILE: where to write it; else where the check reads it. tests/daemon/machine/test_sanity.py then tells whether
the faults that are planted there are still found; how large faults and rounding were is written beside the
tolerances in framepackd/machine/sanity.py.
"""

import json
import sys
from pathlib import Path

import torch

from framepack_core.engine import Engine
from framepack_core.models.registry import BUILT_IN
from framepackd.machine import sanity

torch.set_num_threads(1)
made = sanity.generate(
    Engine.load(BUILT_IN["demo"], device="cpu", dtype="float32"), sanity.request(small=True)
)
samples = sanity.samples(made)
record = {
    "made_from": sanity.made_from(),
    "latents": [float(f"{value:.7g}") for value in samples["latents"]],
    "pixels": [int(value) for value in samples["pixels"]],
}
Path(*sys.argv[1:] or [str(sanity.FINGERPRINT)]).write_text(json.dumps(record) + "\n")
