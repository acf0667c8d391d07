"""ONNX Runtime's int4 product, `com.microsoft::MatMulNBits`, and AWQ's codes in its layout.

    y = x · Wᵀ,   W[n, k] = (B[n, k] - z[n, k // block]) · s[n, k // block]

    B            uint8 [N, K/block, block/2]      two neighbouring inputs a byte, the first in its lower half
    scales       float [N, K/block]               in the dtype of x
    zero_points  uint8 [N, ceil(K/block / 2)]     two neighbouring blocks a byte

A block is a power of two from 16 on, and all of it has one scale. A group is one block or several: of 96 three blocks
of 32, a row of 4096 thirty-two of 128. The numbers are the same, so the products are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.errors import CheckpointError

BLOCKS = (128, 64, 32, 16)
DOMAIN = "com.microsoft"
# Activations stay in float32: 4 would round them to 8 bits, which is faster and changes what is generated.
ACCURACY_LEVEL = 1


def block_size(name: str, group: int) -> int:
    """The largest block that a group is made of. Raises CheckpointError where there is none."""
    for block in BLOCKS:
        if group % block == 0:
            return block
    raise CheckpointError(
        f"{name}: groups of {group} cannot be made of blocks of 16 to 128", hint="quantize with --group-size 32"
    )


def pairs(values: torch.Tensor) -> torch.Tensor:
    """uint8 0..15 [rows, n] to uint8 [rows, ceil(n / 2)]: two neighbours a byte, the first in its lower half."""
    even, odd = values[:, ::2], values[:, 1::2]
    packed = even.clone()
    packed[:, : odd.shape[1]] |= odd << 4
    return packed


class MatMulNBits(nn.Module):
    """A quantized linear that exists to be exported: its forward is one node of the graph, and computes nothing.

    Raises:
        CheckpointError: as `block_size`.
    """

    def __init__(self, name: str, packed: PackedLinear, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.qweight.shape[0], packed.scales.shape[1]
        self.block = block_size(name, packed.group_size)
        blocks, repeat = self.in_features // self.block, packed.group_size // self.block
        weight = pairs(unpack(packed.qweight).t()).reshape(self.out_features, blocks, self.block // 2)
        zeros = unpack(packed.qzeros).t().repeat_interleave(repeat, 1)
        scales = packed.scales.t().to(dtype).repeat_interleave(repeat, 1)
        self.weight: torch.Tensor
        self.scales: torch.Tensor
        self.zero_points: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("zero_points", pairs(zeros))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        y = product(x, self.weight, self.scales, self.zero_points, self.in_features, self.out_features, self.block)
        return y if self.bias is None else y + self.bias


@torch.library.custom_op("awq::mat_mul_n_bits", mutates_args=())
def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    inputs: int,
    outputs: int,
    block: int,
) -> torch.Tensor:
    """The node, for torch's exporter to carry: the shape and dtype of the product, x `[..., in]` -> `[..., out]`."""
    return x.new_zeros((*x.shape[:-1], outputs))


@product.register_fake
def _(x: torch.Tensor, *tensors_and_sizes: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], tensors_and_sizes[-2]))


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=)`: the node that stands for `product`."""
    import onnx
    import onnxscript

    Schema = onnx.defs.OpSchema
    floats, codes = (("F", ["tensor(float)"], ""), ("B", ["tensor(uint8)"], ""))
    sizes = ("K", "N", "bits", "block_size", "accuracy_level")
    schema = Schema(
        "MatMulNBits",
        DOMAIN,
        1,
        inputs=[Schema.FormalParameter(name, kind) for name, kind in zip("xwsz", "FBFB", strict=True)],
        outputs=[Schema.FormalParameter("y", "F")],
        type_constraints=[floats, codes],
        attributes=[Schema.Attribute(name, Schema.AttrType.INT) for name in sizes],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), schema.name, schema)

    def translated(x: Any, weight: Any, scales: Any, zero_points: Any, inputs: int, outputs: int, block: int) -> Any:
        values = dict(zip(sizes, (inputs, outputs, 4, block, ACCURACY_LEVEL), strict=True))
        return node(x, weight, scales, zero_points, **values)

    return {torch.ops.awq.mat_mul_n_bits.default: translated}
