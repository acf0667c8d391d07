"""The matrix products that quantization spends its time in, in full fp32, as fast as the machine has them.

On CPU torch sends fp32 products to MKL, which runs at a third of the speed of oneDNN on processors that are not
Intel's; oneDNN is in the same build of torch and is asked for by name. All accumulate in fp32, and none rounds its
inputs: TF32 is never used.
"""

from __future__ import annotations

import torch

# Rows of a Gram matrix worked in one product: only those left of the diagonal are computed.
_PANEL = 1024


def screening_dtype(device: torch.device) -> torch.dtype:
    """bf16 where it is much faster than fp32: good to 1e-3 of a loss, enough to rank candidates."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def times_symmetric(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """`x @ h` for x `[rows, in]` and a symmetric h `[in, in]` of the same dtype."""
    return times_transposed(x, h)


def add_gram_(gram: torch.Tensor, columns: torch.Tensor) -> None:
    """Add XᵀX to the lower triangle of `gram` `[in, in]` fp32; `mirror_` fills the upper one.

    Args:
        columns: Xᵀ, `[in, rows]`, contiguous: both factors are then read along memory. fp32, or on a GPU bf16 or fp16
            as it came, whose products its tensor cores add up exactly in fp32.
    """
    for start in range(0, len(columns), _PANEL):
        stop = start + _PANEL
        a, b = columns[start:stop], columns[:stop]
        if columns.dtype is torch.float32:
            gram[start:stop, :stop] += times_transposed(a, b)
        else:
            gram[start:stop, :stop] += torch.mm(a, b.T, out_dtype=torch.float32)


def mirror_(gram: torch.Tensor) -> None:
    """Copy what lies below the diagonal of `gram` to above it, panel by panel."""
    for start in range(0, len(gram), _PANEL):
        stop = start + _PANEL
        below = gram[start:stop, start:stop].tril(-1)
        gram[start:stop, start:stop] = below + below.T + gram[start:stop, start:stop].diagonal().diag()
        gram[:start, start:stop] = gram[start:stop, :start].T


def times_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` for contiguous a `[m, k]` and b `[n, k]` of one dtype: both are read along memory."""
    if a.numel() and a.dtype is torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return torch.nn.functional.linear(a, b)
