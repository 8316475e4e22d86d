"""Rates of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: NVIDIA's name.
        copy: bytes a second, read and written together, of a large copy.
        product: FLOP/s of a large dense product of bfloat16 matrices.
        launch: seconds that the smallest kernel takes on the device.
        multiprocessors, capability: as in `torch.cuda.get_device_properties`.
        source: the origin of the rates, in words.
    """

    name: str
    copy: float
    product: float
    launch: float
    multiprocessors: int
    capability: tuple[int, int]
    source: str


# shares of a datasheet's rates, for cards whose rates are not known: an H100 copies at 3.0 of 3.35 TB/s, and multiplies
# at 800 of 989 TFLOP/s
_COPIED, _MULTIPLIED = 0.9, 0.8
_KNOWN, _DATASHEET = "about what such cards reach", "shares of the datasheet's rates"
_LAUNCH = 2e-6

CARDS = {
    "h100": Card("H100 SXM 80 GB", 3.0e12, 800e12, _LAUNCH, 132, (9, 0), _KNOWN),
    "h200": Card("H200 SXM 141 GB", 4.3e12, 790e12, _LAUNCH, 132, (9, 0), _KNOWN),
    "a100": Card("A100 SXM 80 GB", _COPIED * 2.04e12, _MULTIPLIED * 312e12, _LAUNCH, 108, (8, 0), _DATASHEET),
    "b200": Card("B200 180 GB", _COPIED * 8.0e12, _MULTIPLIED * 2250e12, _LAUNCH, 148, (10, 0), _DATASHEET),
}
