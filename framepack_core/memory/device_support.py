"""Warns about a usable GPU's weaknesses: no bfloat16, a faulty cuDNN."""

import torch

BFLOAT16 = (8, 0)  # the first compute capability that has it
# cuDNN versions with wrong 3D convolutions in half precision: PyTorch computes them without cuDNN there
# (pytorch issues 163539 and 166643).
CONV3D_WRONG, CONV3D_RIGHT = 90800, 91500


def warnings(device: torch.device, dtype: torch.dtype) -> list[str]:
    """List a device's weaknesses for a transformer of a dtype, each with what to set or install."""
    if device.type != "cuda":
        return []
    found = [*_of_card(device, dtype), *_of_cudnn()]
    if dtype == torch.float16:
        found.append(
            'dtype = "float16" makes black videos with the published models (diffusers issue 11830): '
            'set "auto"'
        )
    return found


def _of_card(device: torch.device, dtype: torch.dtype) -> list[str]:
    own = torch.cuda.get_device_capability(device)
    if own >= BFLOAT16 or dtype != torch.bfloat16:
        return []
    # Below 8.0 neither flash nor memory-efficient attention supports bfloat16: the whole matrix is stored.
    return [
        f"{torch.cuda.get_device_name(device)} has compute capability {own[0]}.{own[1]}, and bfloat16 needs "
        "8.0 (RTX 30): it is emulated, and PyTorch's attention takes much more memory with it. Expect steps "
        'that take several times as long, or too little memory. dtype = "float32" is not emulated and takes '
        "twice the memory: try it with framepackd sanity-check"
    ]


def _of_cudnn() -> list[str]:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call] # torch's own
    if version is None or not CONV3D_WRONG <= version < CONV3D_RIGHT:
        return []
    number = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    package = f"nvidia-cudnn-cu{(torch.version.cuda or '12').partition('.')[0]}"
    return [
        f"cuDNN {number} computes 3D convolutions in half precision wrong, so torch {torch.__version__} does "
        "not use it, and encoding and decoding take several times the memory and time: "
        f"pip install '{package}>=9.15', or use a newer torch"
    ]
