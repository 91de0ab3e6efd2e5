"""How fast cards read memory and multiply, as their makers publish it: for estimates that say they are computed."""

from __future__ import annotations

#: In which matrices can rest in 8 bits: names of ``kernels.resident8.FORMATS``, for whoever must not import torch.
FORMATS = ("int8", "fp8", "int8_row")

#: Name in CARDS -> (GB a second of memory, TFLOPS of dense bfloat16 products with float32 sums). GeForce cards up to
#: Ada sum at half the rate of their professional twins.
SPEEDS: dict[str, tuple[float, float]] = {
    "rtx3060-12": (360, 25.5), "rtx3060ti": (448, 32.4), "rtx3070": (448, 40.6), "rtx3070ti": (608, 43.5),
    "rtx3080-10": (760, 59.5), "rtx3080-12": (912, 61.3), "rtx3080ti": (912, 68.2), "rtx3090": (936, 71.2),
    "rtx3090ti": (1008, 80.0), "rtx4060": (272, 30.2), "rtx4060ti-8": (288, 44.1), "rtx4060ti-16": (288, 44.1),
    "rtx4070": (504, 58.3), "rtx4070super": (504, 71.0), "rtx4070ti": (504, 80.2), "rtx4070tisuper": (672, 88.2),
    "rtx4080": (717, 97.5), "rtx4080super": (736, 104.4), "rtx4090": (1008, 165.2), "rtx5060ti-16": (448, 47.4),
    "rtx5070": (672, 61.7), "rtx5070ti": (896, 87.9), "rtx5080": (960, 112.6), "rtx5090": (1792, 209.5),
    "rtxa6000": (768, 154.8), "rtx6000ada": (960, 364.2), "a10": (600, 125), "a30": (933, 165), "a40": (696, 149.7),
    "l4": (300, 121), "l40": (864, 181), "l40s": (864, 362), "a100-40": (1555, 312), "a100-80": (2039, 312),
    "h100": (3350, 989), "h200": (4800, 989), "b200": (8000, 2250), "mi300x": (5300, 1307),
}  # fmt: skip


def peak_flops(card: str) -> float:
    """Dense bfloat16 FLOP a second of a card in SPEEDS."""
    return 1e12 * SPEEDS[card][1]
