"""What GPUs do at best."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as NVIDIA calls it.
        copy: bytes a second, read and written together, of a large copy.
        product: FLOP/s of a large dense product of bfloat16 matrices.
        launch: seconds that the smallest kernel takes on the device.
        multiprocessors, capability: as `torch.cuda.get_device_properties` has them.
        source: where the rates come from.
    """

    name: str
    copy: float
    product: float
    launch: float
    multiprocessors: int
    capability: tuple[int, int]
    source: str


# what is taken of a datasheet's rates where nothing is known of a card: of 3.35 TB/s an H100 copies 3.0, of 989 TFLOP/s
# it multiplies at 800
_COPIED, _MULTIPLIED = 0.9, 0.8
_KNOWN, _DATASHEET = "about what such cards reach", "shares of the datasheet's rates"
_LAUNCH = 2e-6

CARDS = {
    "h100": Card("H100 SXM 80 GB", 3.0e12, 800e12, _LAUNCH, 132, (9, 0), _KNOWN),
    "h200": Card("H200 SXM 141 GB", 4.3e12, 790e12, _LAUNCH, 132, (9, 0), _KNOWN),
    "a100": Card("A100 SXM 80 GB", _COPIED * 2.04e12, _MULTIPLIED * 312e12, _LAUNCH, 108, (8, 0), _DATASHEET),
    "b200": Card("B200 180 GB", _COPIED * 8.0e12, _MULTIPLIED * 2250e12, _LAUNCH, 148, (10, 0), _DATASHEET),
}
