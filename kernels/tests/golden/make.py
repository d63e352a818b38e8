"""Makes the golden files of kernels/tests/format.rs with the `gguf` package (0.17 or later).

    python kernels/tests/golden/make.py

For each format, `<name>.bytes` holds blocks and `<name>.f32` what gguf.quants.dequantize makes of
them. Formats that the package can quantize start from `floats.f32`; the others are random blocks
with finite scales. Everything is little-endian.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

HERE = Path(__file__).parent
# Where the blocks of a format have binary16 numbers: random bits there could be infinite.
HALVES = {
    "Q2_K": (84, [80, 82]),
    "Q3_K": (110, [108]),
    "Q4_K": (144, [0, 2]),
    "Q5_K": (176, [0, 2]),
    "Q6_K": (210, [208]),
    "IQ4_NL": (18, [0]),
    "IQ4_XS": (136, [0]),
}
EDGES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF]


def floats(rng):
    """Twenty blocks of 32: ordinary weights of many sizes, then the edges."""
    rows = [rng.standard_normal(32) * size for size in (1e-7, 3e-5, 0.02, 0.02, 1, 30, 4e4)]
    rows += [np.zeros(32), -np.zeros(32), np.full(32, -3.25), np.full(32, 7.0)]
    rows.append(np.where(np.arange(32) == 17, -5.0, 0))
    rows.append(np.linspace(-127, 127, 32))
    rows.append(np.arange(32) - 16.0)
    rows.append((np.arange(32) - 15.5) / 8)
    rows.append(np.where(np.arange(32) % 2 == 0, 6.0, -6.0))
    rows.append(np.concatenate([np.arange(16) * 0.5, -np.arange(16) * 0.5]))
    rows.append(np.concatenate([[127.0], np.arange(31) + 0.5]))
    rows.append(np.concatenate([[-127.0], -np.arange(31) - 0.5]))
    rows.append(rng.uniform(-1, 1, 32) * 6e-5)
    return np.stack(rows).astype(np.float32)


def random_blocks(rng, size, halves):
    blocks = rng.integers(0, 256, (4 if size > 32 else 12, size), dtype=np.uint8)
    for b, block in enumerate(blocks):
        for h, at in enumerate(halves):
            scale = np.float16(rng.standard_normal() * 0.01).view(np.uint16)
            bits = EDGES[(b + 3 * h) % len(EDGES)] if b % 2 else int(scale)
            block[at : at + 2] = (bits & 255, bits >> 8)
    return blocks.reshape(-1)


def main():
    rng = np.random.default_rng(20)
    values = floats(rng)
    values.tofile(HERE / "floats.f32")
    for name in ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *HALVES]:
        if name in HALVES:
            data = random_blocks(rng, *HALVES[name])
        else:
            data = quants.quantize(values, Type[name]).reshape(-1).view(np.uint8)
        data.tofile(HERE / f"{name}.bytes")
        quants.dequantize(data, Type[name]).reshape(-1).tofile(HERE / f"{name}.f32")


main()
