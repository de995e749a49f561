# SPDX-License-Identifier: Apache-2.0
"""int8 weights straight from the checkpoint, a few rows at a time.

NNCF's int8_sym gives the same form, but holds several float copies of a whole matrix: gigabytes for an embedding.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..checkpoint.weights import Weight
from ..errors import CheckpointError


# Numbers worked on at a time: enough to share among threads, few enough to stay in a processor's cache.
_BLOCK = 1 << 20


def quantize_rows(name: str, weight: Weight) -> Weight:
    """Rounds a matrix `[rows, columns]` to int8, with one fp16 scale a row; a vector, or what is quantised, stays.

    As in NNCF's int8_sym, the scale has the sign that makes the number of largest magnitude -128. The integers are
    found with the scale as it is stored, rounded to fp16.

    Raises:
        CheckpointError: a row whose scale fp16 cannot hold.
    """
    if weight.scale is not None or weight.data.ndim != 2:
        return weight
    data = weight.data
    rows, columns = data.shape
    integers = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float16)
    step = max(1, _BLOCK // columns)
    block = torch.empty(min(step, rows), columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        numbers = block[: part.stop - start].copy_(data[part])
        low, high = torch.aminmax(numbers, dim=1)
        scale[part] = torch.where(-low >= high, -low, -high) / 128
        scale[part].masked_fill_(scale[part] == 0, torch.finfo(torch.float16).smallest_normal)
        numbers.div_(scale[part].float()[:, None])
        integers[part] = torch.round(numbers, out=numbers).clamp_(-128, 127)
    if not torch.isfinite(scale).all():
        raise CheckpointError(f"{name}: numbers up to {data.abs().max():.3g}, too large for int8 with fp16 scales.")
    return replace(weight, data=integers, scale=scale, bits=8)
