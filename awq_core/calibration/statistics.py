"""What is kept of a linear's input: enough to score any quantized weight without looking at the tokens again.

For input X (tokens x in) and a weight error D (out x in) the mean squared output error over all tokens is

    (1/n) ||X Dᵀ||² / out  =  tr(D H Dᵀ) / out,      H = XᵀX / n

so one `in x in` Gram matrix replaces the tokens exactly, and scoring a candidate costs out·in² whatever n is.
Accumulation is in fp32: products of two bf16 numbers are exact there, and TF32 is never used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awq_core.errors import NumericsError
from awq_core.gemm import add_gram_, mirror_, times_symmetric


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one linear input over n tokens.

    Attributes:
        n: tokens seen.
        gram: H = XᵀX / n, `[in, in]` fp32.
        mean_abs: E|x|, `[in]` fp32.
        mean: E[x], `[in]` fp32.
    """

    n: int
    gram: torch.Tensor
    mean_abs: torch.Tensor
    mean: torch.Tensor

    def rescale_(self, s: torch.Tensor) -> None:
        """Become the statistics of x / s, for s `[in]`, in place: a Gram matrix is too large to have twice."""
        self.gram.div_(s[:, None]).div_(s)
        self.mean_abs.div_(s)
        self.mean.div_(s)


class StatisticsAccumulator:
    """Sums over batches; `finish` divides by the number of tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.n = 0
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._abs = torch.zeros(in_features, device=device)
        self._sum = torch.zeros(in_features, device=device)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the rows of `x` (`[..., in]`); `mask` (`[...]`, bool) leaves out padding tokens."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1)]
        self.n += rows.shape[0]
        dtype = rows.dtype if rows.is_cuda else torch.float32
        columns = torch.empty(rows.shape[::-1], dtype=dtype, device=rows.device).copy_(rows.T)
        add_gram_(self._gram, columns)
        self._abs += torch.linalg.vector_norm(columns, 1, dim=1, dtype=torch.float32)
        self._sum += columns.sum(1, dtype=torch.float32)

    def finish(self, name: str) -> Statistics:
        """The statistics; `name` is the layer, for messages.

        Raises:
            NumericsError: NaN or inf among the activations.
        """
        n = max(self.n, 1)
        mirror_(self._gram)
        result = Statistics(self.n, self._gram.div_(n), self._abs / n, self._sum / n)
        if not torch.isfinite(result.gram).all():
            raise NumericsError(
                f"the input of {name} holds NaN or inf during calibration",
                hint="the model may overflow in this dtype: try --dtype float32",
            )
        return result


def output_loss(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row, `[out]`: diag(D H Dᵀ) for D `[out, in]`, H `[in, in]`."""
    return torch.linalg.vecdot(times_symmetric(error, gram), error)
