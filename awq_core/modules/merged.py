"""Several linears that read one tensor, as one product.

    [q, k, v] = x · [Wq; Wk; Wv]ᵀ          [gate, up] = x · [Wgate; Wup]ᵀ

The module around them keeps its own `forward`: each linear is replaced by a `Part`. The first that is called with a
tensor x computes the product for all and the others, called with that same x, take their share. So nothing is assumed
of the `forward`, and no rope, mask, window or activation is written a second time. Were a part called with another
tensor, it would compute the product of that one: slower, and right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn


class MergedProduct(nn.Module):
    """One linear and the shares of its last output that nobody has taken yet.

    Attributes:
        linear: writes the outputs of all parts side by side, `[..., sum(sizes)]`.
        sizes: output features of each part.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = list(sizes)
        self._held: tuple[torch.Tensor, list[torch.Tensor | None]] | None = None

    def share(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """x `[..., in]` -> `[..., sizes[index]]`, a view of the product."""
        held = self._held  # read once: another thread may replace it
        out = None if held is None or held[0] is not x else held[1][index]
        if held is None or out is None:
            held = (x, list(self.linear(x).split(self.sizes, dim=-1)))
            self._held = held
            out = held[1][index]
            assert out is not None
        held[1][index] = None
        if all(one is None for one in held[1]) and self._held is held:
            self._held = None  # holds neither x nor its product longer than it must
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> MergedProduct:
        import copy

        made = MergedProduct(copy.deepcopy(self.linear, memo), self.sizes).train(self.training)
        memo[id(self)] = made
        return made


class Part(nn.Module):
    """What stands where one of the linears was. All parts of a product hold it as `product`."""

    def __init__(self, product: MergedProduct, index: int) -> None:
        super().__init__()
        self.product = product
        self.index = index
        self.in_features = getattr(product.linear, "in_features", None)
        self.out_features = product.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        return self.product.share(x, self.index)

    def extra_repr(self) -> str:
        return f"part={self.index}, in_features={self.in_features}, out_features={self.out_features}"


def merge_products(module: nn.Module, merged: nn.Module | None, sizes: Mapping[str, int]) -> nn.Module:
    """Factory of a fused block: the module, unchanged but for its parts. They must read the same tensor."""
    assert merged is not None
    product = MergedProduct(merged, list(sizes.values()))
    for index, path in enumerate(sizes):
        module.set_submodule(path, Part(product, index))
    return module
