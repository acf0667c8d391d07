"""A product in torch for vLLM's int4 linears, on CPUs for which it has none: its own is compiled for AVX512."""

from typing import Any

import torch

from peers.layouts import nibbles

NAME = "cpu_gemm_wna16"
SCHEMA = "(Tensor x, Tensor words, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, int pack, str isa) -> ()"


def product(
    x: torch.Tensor,
    words: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    pack: int,
    isa: str,
) -> None:
    """out [tokens, outputs] = x [tokens, inputs] @ weight + bias, in float32.

    `words` [outputs/16, 2 * inputs] has 16 outputs of one input side by side; `zeros` is [groups, outputs/8], `scales`
    [groups, outputs].
    """
    inputs = x.shape[1]
    rows = words.view(-1, inputs, 2).permute(1, 0, 2).reshape(inputs, -1)
    codes, zeros = nibbles(rows), nibbles(zeros)
    group = torch.arange(inputs) // (inputs // len(scales))
    result = x.float() @ ((codes - zeros[group]) * scales.float()[group])
    out.copy_(result if bias is None else result + bias.float())


def stand_in() -> Any:
    """Put `product` in its place where vLLM has no kernel here, for as long as what is returned lives; else None."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if hasattr(torch.ops._C, NAME):
        return None
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(NAME + SCHEMA)
    library.impl(NAME, product, "CPU")
    return library
