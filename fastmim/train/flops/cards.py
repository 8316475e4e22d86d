"""Rates and sizes of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU, or a processor that takes its place.

    Attributes:
        name: NVIDIA's name.
        copy: bytes a second, read and written together, of a large copy.
        product: FLOP/s of a large dense product of bfloat16 matrices.
        launch: seconds that the smallest kernel takes on the device.
        multiprocessors, capability: as in `torch.cuda.get_device_properties`.
        source: the origin of the rates, in words.
        memory: bytes on the card, as the datasheet has them; None: not known.
        link: bytes a second that the card sends to the others of its node, over NVLink or PCIe; None: not known.
        linked: the name of that link.
        network: bytes a second that a node of such cards sends to the others; None: not known.
    """

    name: str
    copy: float
    product: float
    launch: float
    multiprocessors: int
    capability: tuple[int, int]
    source: str
    memory: int | None = None
    link: float | None = None
    linked: str = "PCIe"
    network: float | None = None


# shares of a datasheet's rates, for cards whose rates are not known: an H100 copies at 3.0 of 3.35 TB/s, and multiplies
# at 800 of 989 TFLOP/s
_COPIED, _MULTIPLIED = 0.9, 0.8
_KNOWN, _DATASHEET = "about what such cards reach", "shares of the datasheet's rates"
_LAUNCH = 2e-6
_TERA, _GIGA = 1e12, 1e9
# GB/s in one direction; datasheets have both directions of NVLink added. Of PCIe 16 lanes.
_PCIE4, _PCIE5 = 32.0, 64.0
# Gbit/s of a node: an adapter of the fastest kind of the card's time. A node of DGX H100 has eight of 400 Gbit/s
_NDR, _HDR, _ETHERNET = 400, 200, 100

# GB of memory; TB/s of memory; TFLOP/s of dense bfloat16 products with float32 sums (datasheets also have twice that,
# "with sparsity"); GB/s of the link; its name; Gbit/s of a node; multiprocessors; capability; name.
# Sources: NVIDIA's datasheets of H100, H200, A100, L40S, L4 and HGX B200; for GeForce cards its white papers on Ada
# (RTX 4090: 165.2 TFLOP/s) and on GA102 (RTX 3090 and A6000: 71 and 154.8 TFLOP/s)
_SHEETS: dict[str, tuple[float, float, float, float, str, int, int, tuple[int, int], str]] = {
    "h100": (80, 3.35, 989, 450, "NVLink", _NDR, 132, (9, 0), "H100 SXM 80 GB"),
    "h200": (141, 4.8, 989, 450, "NVLink", _NDR, 132, (9, 0), "H200 SXM 141 GB"),
    "b200": (180, 8.0, 2250, 900, "NVLink", _NDR, 148, (10, 0), "B200 180 GB"),
    "h100-pcie": (80, 2.0, 756, _PCIE5, "PCIe", _HDR, 114, (9, 0), "H100 PCIe 80 GB"),
    "a100": (80, 2.04, 312, 300, "NVLink", _HDR, 108, (8, 0), "A100 SXM 80 GB"),
    "a100-40": (40, 1.555, 312, 300, "NVLink", _HDR, 108, (8, 0), "A100 SXM 40 GB"),
    "l40s": (48, 0.864, 362, _PCIE4, "PCIe", _ETHERNET, 142, (8, 9), "L40S 48 GB"),
    "l4": (24, 0.3, 121, _PCIE4, "PCIe", _ETHERNET, 58, (8, 9), "L4 24 GB"),
    "4090": (24, 1.008, 165.2, _PCIE4, "PCIe", _ETHERNET, 128, (8, 9), "GeForce RTX 4090 24 GB"),
    "3090": (24, 0.936, 71, _PCIE4, "PCIe", _ETHERNET, 82, (8, 6), "GeForce RTX 3090 24 GB"),
    "a6000": (48, 0.768, 154.8, _PCIE4, "PCIe", _ETHERNET, 84, (8, 6), "RTX A6000 48 GB"),
}
# TB/s and TFLOP/s of copies and products of cards that are known well
_REACHED = {"h100": (3.0, 800), "h200": (4.3, 790)}


def _card(key: str) -> Card:
    memory, copy, product, link, linked, network, multiprocessors, capability, name = _SHEETS[key]
    reached = _REACHED.get(key)
    copied, multiplied = reached or (_COPIED * copy, _MULTIPLIED * product)
    return Card(
        name,
        copied * _TERA,
        multiplied * _TERA,
        _LAUNCH,
        multiprocessors,
        capability,
        _KNOWN if reached else _DATASHEET,
        int(memory * _GIGA),
        link * _GIGA,
        linked,
        network * _GIGA / 8,
    )


CARDS = {key: _card(key) for key in _SHEETS}


def custom(
    memory_gb: float,
    copy_tbs: float,
    product_tflops: float,
    *,
    link_gbs: float | None = None,
    network_gbps: float | None = None,
) -> Card:
    """Return a card of rates that are given; kernels are chosen as on an A100, which has the oldest that Triton serves.

    Args:
        memory_gb: GB of memory.
        copy_tbs: TB/s of a large copy, read and written together.
        product_tflops: TFLOP/s of a large dense product of bfloat16 matrices.
        link_gbs: GB/s that the card sends to others of its node. Default: 16 lanes of PCIe 4.
        network_gbps: Gbit/s that a node sends. Default: 100.
    """
    like = CARDS["a100"]
    return Card(
        f"card of {memory_gb:g} GB, {copy_tbs:g} TB/s, {product_tflops:g} TFLOP/s",
        copy_tbs * _TERA,
        product_tflops * _TERA,
        _LAUNCH,
        like.multiprocessors,
        like.capability,
        "given",
        int(memory_gb * _GIGA),
        (_PCIE4 if link_gbs is None else link_gbs) * _GIGA,
        "PCIe" if link_gbs is None else "its link",
        (_ETHERNET if network_gbps is None else network_gbps) * _GIGA / 8,
    )
