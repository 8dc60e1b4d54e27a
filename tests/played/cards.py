"""The cards that are played: their memory and their speed, from data sheets."""

from dataclasses import dataclass

GIB = 1 << 30
CONTEXT = 500 << 20  # what CUDA's context takes of a card


@dataclass(frozen=True)
class CardModel:
    """A card as a roofline model: an operation takes the longer of its arithmetic and its traffic."""

    name: str
    memory: int  # bytes, as the driver tells them
    capability: tuple[int, int]
    flops: float  # of matrices, a second, bfloat16
    bandwidth: float  # of its memory, bytes a second
    bus: float  # from page-locked memory, one way, bytes a second
    pageable: float = 6e9  # from any other
    launch: float = 6e-6  # seconds of the host, an operation
    queue: int = 1024  # operations that may wait; then the host does


def _gib(amount: float) -> int:
    return int(amount * GIB)


RTX_3060_6 = CardModel("NVIDIA GeForce RTX 3060 Laptop GPU", _gib(5.8), (8, 6), 26e12, 0.30e12, 12e9)
RTX_4060_8 = CardModel("NVIDIA GeForce RTX 4060", _gib(7.7), (8, 9), 60e12, 0.25e12, 12e9)
RTX_3060_12 = CardModel("NVIDIA GeForce RTX 3060", _gib(11.6), (8, 6), 51e12, 0.36e12, 12e9)
RTX_4080_16 = CardModel("NVIDIA GeForce RTX 4080", _gib(15.6), (8, 9), 97e12, 0.66e12, 25e9)
RTX_4090_24 = CardModel("NVIDIA GeForce RTX 4090", _gib(23.6), (8, 9), 165e12, 0.92e12, 25e9)
H100_80 = CardModel("NVIDIA H100 80GB HBM3", _gib(79.2), (9, 0), 720e12, 3.0e12, 50e9)
CARDS = {6: RTX_3060_6, 8: RTX_4060_8, 12: RTX_3060_12, 16: RTX_4080_16, 24: RTX_4090_24, 80: H100_80}
