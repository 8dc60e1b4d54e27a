"""Names a model by what its files hold, wherever they lie. No torch here."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack

from framepack_core.models import model_files, registry
from framepack_core.models.headers import Tensor
from framepack_core.models.registry import ModelSpec

# Of each tensor. Training changes nearly every number, and to read all of 45 GB would take minutes.
SAMPLE_BYTES = 4096
DIGITS = 16


def digest(spec: ModelSpec) -> str:
    """Give a name that equal models share, whatever their folders and however their weights are split.

    Raises:
        ModelError: a file is missing, or does not hold the model's weights.
        OSError: one cannot be read.
    """
    total = hashlib.sha256()
    for part, stored in sorted(model_files.look(spec).items()):
        # Names that begin with _ tell which library wrote the file, and from where.
        config = {key: value for key, value in stored.config.items() if not key.startswith("_")}
        total.update(f"{part} {json.dumps(config, sort_keys=True)}\n".encode())
        total.update(_sampled(stored.tensors))
    found = registry.find(spec)
    sources = ((found.base, registry.BASE_COMPONENTS), (found.image_encoder, registry.IMAGE_COMPONENTS))
    for folder, components in sources:
        for component, names in components.items():
            if component not in registry.WEIGHTS:  # tokenizers and the like
                for name in names:
                    total.update(hashlib.sha256((folder / component / name).read_bytes()).digest())
    return total.hexdigest()[:DIGITS]


def _sampled(tensors: Mapping[str, Tensor]) -> bytes:
    """Hash the beginning of each tensor, in the order of their names."""
    total = hashlib.sha256()
    with ExitStack() as stack:
        files = {tensor.file for tensor in tensors.values()}
        streams = {file: stack.enter_context(file.open("rb")) for file in files}
        for name, tensor in sorted(tensors.items()):
            for each in filter(None, (tensor, tensor.scale)):
                total.update(f"{name} {each.dtype} {each.shape}\n".encode())
                streams[tensor.file].seek(each.start)
                total.update(streams[tensor.file].read(min(each.nbytes, SAMPLE_BYTES)))
    return total.digest()
