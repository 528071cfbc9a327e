"""Rates of GPUs: matrix products, memory, and the link to the host, to predict times without the GPU.

name of a GPU → Card

Nominal figures of data sheets, times what large operations reach of them. No torch, and no device is queried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from bigbatch.memory.limit import GPU_GIB

PRODUCT_SHARE = 0.787
"""Of the nominal rate in products of 8,192 × 8,192 matrices in bf16: 778 of 989 TFLOP/s on an H200 (torch 2.11)."""

COPY_SHARE = 0.896
"""Of the nominal memory rate in a copy: 4.3 of 4.8 TB/s on an H200."""

LINK_GB_S = MappingProxyType({3: 12.0, 4: 24.0, 5: 48.0})
"""GB/s by generation of PCIe over 16 lanes, in each direction while both are busy; assumed, not measured."""

MEASURED_LINK_GB_S = MappingProxyType({"h200": 50.3})
"""The same, measured: 64 MiB at a time from and to pinned memory (torch 2.11); 55.2 and 55.1 GB/s in one direction."""

# Dense products of bf16 (fp16 before Ampere) summed in float32, TFLOP/s; memory, GB/s; generation of PCIe; GB/s to
# other cards of the machine in each direction over a switch, 0 without one.
_NOMINAL = {
    "a100-40gb": (312.0, 1555, 4, 300),
    "a100-80gb": (312.0, 2039, 4, 300),
    "h100": (989.0, 3350, 5, 450),
    "h100-nvl": (835.0, 3938, 5, 0),
    "h200": (989.0, 4800, 5, 450),
    "b200": (2250.0, 8000, 5, 900),
    "l4": (121.0, 300, 4, 0),
    "l40s": (362.0, 864, 4, 0),
    "a10g": (70.0, 600, 4, 0),
    "a6000": (155.0, 768, 4, 0),
    "t4": (65.0, 320, 3, 0),
    "v100-16gb": (125.0, 900, 3, 0),
    "v100-32gb": (125.0, 900, 3, 0),
    "rtx-3060-12gb": (25.5, 360, 4, 0),
    "rtx-3090": (71.0, 936, 4, 0),
    "rtx-4080": (97.5, 717, 4, 0),
    "rtx-4090": (165.0, 1008, 4, 0),
    "rtx-5090": (209.5, 1792, 5, 0),
    "mi250": (181.0, 1638, 4, 0),
    "mi300x": (1307.0, 5300, 5, 0),
}

TYPICAL = MappingProxyType(
    {"12GB": "rtx-3060-12gb", "16GB": "rtx-4080", "24GB": "rtx-4090", "40GB": "a100-40gb", "80GB": "h100"}
)
"""A card of each common size."""


@dataclass(frozen=True)
class Card:
    """Rates of a GPU.

    Attributes:
        name: Its key in `bigbatch.memory.limit.GPU_GIB`.
        products_per_s: Floating-point operations of matrix products per second.
        memory_rate: Bytes read and written per second.
        link_rate: Bytes per second between card and pinned host memory, in each direction while both are busy.
        link_is_measured: Whether that was measured; otherwise it is assumed from the generation of PCIe.
        pcie: Generation of PCIe.
        fabric_rate: Bytes per second to other cards of the machine; that of the link without a switch.
    """

    name: str
    products_per_s: float
    memory_rate: float
    link_rate: float
    link_is_measured: bool
    pcie: int
    fabric_rate: float

    def with_link_rate(self, link_rate: float | None) -> Card:
        """Return the card with a link that was measured; itself if it was not."""
        return self if link_rate is None else replace(self, link_rate=link_rate, link_is_measured=True)

    def __str__(self) -> str:
        link = "measured" if self.link_is_measured else f"assumed for PCIe {self.pcie}"
        return (
            f"{self.name}: {self.products_per_s / 1e12:.0f} TFLOP/s, {self.memory_rate / 1e12:.1f} TB/s, link "
            f"{self.link_rate / 1e9:.0f} GB/s in each direction ({link})"
        )


def card(name: str) -> Card:
    """Return the rates of a GPU, by its key in `bigbatch.memory.limit.GPU_GIB`.

    Raises:
        KeyError: It is not a key.
    """
    products, memory, pcie, fabric = _NOMINAL[name]
    measured = MEASURED_LINK_GB_S.get(name)
    link_rate = 1e9 * (LINK_GB_S[pcie] if measured is None else measured)
    return Card(
        name=name,
        products_per_s=PRODUCT_SHARE * products * 1e12,
        memory_rate=COPY_SHARE * memory * 1e9,
        link_rate=link_rate,
        link_is_measured=measured is not None,
        pcie=pcie,
        fabric_rate=fabric * 1e9 or link_rate,
    )


def card_of_size(total_bytes: int) -> Card:
    """Return the typical card with at least so much memory, to within a tenth; the largest of them if there is none."""
    sizes = sorted((GPU_GIB[name], name) for name in TYPICAL.values())
    return card(next((name for gib, name in sizes if 1.1 * gib * 2**30 >= total_bytes), sizes[-1][1]))
