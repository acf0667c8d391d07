"""What is kept of a linear's input: enough to score any quantized weight without looking at the tokens again.

For input X (tokens x in) and a weight error D (out x in) the mean squared output error over all tokens is

    (1/n) ||X Dᵀ||² / out  =  tr(D H Dᵀ) / out,      H = XᵀX / n

so one `in x in` Gram matrix replaces the tokens exactly, and scoring a candidate costs out·in² whatever n is.
Accumulation is in fp32: products of two bf16 numbers are exact there, and TF32 is never used.

Tokens may count unequally. What an expert of a mixture computes of token t is multiplied by its gate g(t) before it is
added up, and so is its error; where the router sends the token elsewhere, g(t) = 0. So its tokens have the weights g²:

    H_routed = Σ g² x xᵀ / Σ g²,        n_eff = (Σ g²)² / Σ g⁴         (Kish: tokens of equal weight that are as many)

An expert that saw few tokens has a poor estimate, so the all-token matrix is mixed in as if it were n₀ tokens more:

    H = (n_eff · H_routed + n₀ · H_all) / (n_eff + n₀),        n₀ = in_features

That is again a weighted mean over tokens, with an effective number of its own, and it is H_all where nothing is routed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from awq_core.errors import NumericsError
from awq_core.gemm import add_gram_, mirror_, times_symmetric

# n₀ as a multiple of in_features.
PRIOR_TOKENS_PER_FEATURE = 1.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one linear input over n tokens.

    Attributes:
        n: tokens seen; of an expert's own statistics, tokens that were routed to it.
        gram: H = XᵀX / n, `[in, in]` fp32; weighted by g² where tokens count unequally, and so are the means.
        mean_abs: E|x|, `[in]` fp32.
        mean: E[x], `[in]` fp32.
        effective: tokens of equal weight that would say as much; None: n.
        routed: tokens that were routed to the expert whose linear this is; None outside a mixture's experts.
        own: statistics of the same input, before any `rescale_`, over the tokens routed to one expert, still to be
            mixed in (`with_own`): n and all tensors here are of all tokens, shared with the other experts.
    """

    n: int
    gram: torch.Tensor
    mean_abs: torch.Tensor
    mean: torch.Tensor
    effective: float | None = None
    routed: int | None = None
    own: Statistics | None = None

    @property
    def n_effective(self) -> float:
        """Tokens of equal weight that would estimate H as well."""
        return self.n if self.effective is None else self.effective

    def rescale_(self, s: torch.Tensor) -> None:
        """Become the statistics of x / s, for s `[in]`, in place: a Gram matrix is too large to have twice."""
        self.gram.div_(s[:, None]).div_(s)
        self.mean_abs.div_(s)
        self.mean.div_(s)

    def centered(self) -> Statistics:
        """With the Gram matrix of x − E[x], in new memory: what is left where a bias absorbs the mean of the error."""
        return replace(self, gram=self.gram.addr(self.mean, self.mean, alpha=-1))

    def towards_(self, everything: Statistics) -> Statistics:
        """An expert's own statistics, mixed with those of all tokens: H of the docstring above, in place, the result
        has this memory."""
        few, prior = self.n_effective, PRIOR_TOKENS_PER_FEATURE * len(self.gram)
        share = few / (few + prior)
        for name in ("gram", "mean_abs", "mean"):
            getattr(self, name).mul_(share).add_(getattr(everything, name), alpha=1 - share)
        # Kish's (Σw)² / Σw² for the weights share · g²/Σg² + (1 − share)/n, whose sum is one.
        squares = (share**2 / few if few else 0.0) + (1 - share**2) / max(everything.n, 1)
        return replace(self, n=everything.n, effective=1 / squares, routed=self.n)

    def with_own(self, s: torch.Tensor | None = None) -> Statistics:
        """These statistics with `own` mixed in, in new memory; `s` `[in]`: what they were rescaled by in between."""
        if self.own is None:
            return self
        copies = {name: getattr(self.own, name).clone() for name in ("gram", "mean_abs", "mean")}
        own = replace(self.own, **copies)
        if s is not None:
            own.rescale_(s)
        return own.towards_(self)


@dataclass(slots=True)
class Sums:
    """What is summed over tokens. The sums over two parts of the tokens add up to those over both.

    Attributes:
        gram: Σ w x xᵀ, `[in, in]` fp32, of which the lower half counts.
        absolute, total: Σ w |x| and Σ w x, `[in]` fp32.
        n: tokens.
        weight, squares: Σ w and Σ w² where tokens have weights, w = g².
        weighted: whether they have.
    """

    gram: torch.Tensor
    absolute: torch.Tensor
    total: torch.Tensor
    n: int = 0
    weight: float = 0.0
    squares: float = 0.0
    weighted: bool = False

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> Sums:
        """Of no tokens."""
        gram = torch.zeros(in_features, in_features, device=device)
        return cls(gram, gram.new_zeros(in_features), gram.new_zeros(in_features))

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None, gate: torch.Tensor | None = None) -> None:
        """Add the rows of `x` (`[..., in]`).

        Args:
            mask: `[...]` bool, leaves out padding tokens.
            gate: `[...]`, what the output of each token will be multiplied by; 0 leaves a token out.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        keep = mask.reshape(-1) if mask is not None and mask.numel() == rows.shape[0] else None
        if gate is not None:
            gate = gate.detach().reshape(-1).float()
            keep = gate != 0 if keep is None else keep & (gate != 0)
            gate = gate[keep]
            self.weighted = True
        if keep is not None:
            rows = rows[keep]
        if not rows.shape[0]:
            return
        self.n += rows.shape[0]
        dtype = rows.dtype if rows.is_cuda and gate is None else torch.float32
        columns = torch.empty(rows.shape[::-1], dtype=dtype, device=rows.device).copy_(rows.T)
        if gate is not None:
            columns *= gate
        add_gram_(self.gram, columns)
        if gate is None:
            self.absolute += torch.linalg.vector_norm(columns, 1, dim=1, dtype=torch.float32)
            self.total += columns.sum(1, dtype=torch.float32)
        else:
            self.absolute += columns.abs() @ gate.abs()
            self.total += columns @ gate
            weight = gate.double().square()
            self.weight += float(weight.sum())
            self.squares += float(weight.square().sum())

    def merge_(self, other: Sums) -> None:
        """Add the sums over other tokens."""
        self.gram += other.gram
        self.absolute += other.absolute
        self.total += other.total
        self.n += other.n
        self.weight += other.weight
        self.squares += other.squares
        self.weighted |= other.weighted

    def finish(self, name: str) -> Statistics:
        """The statistics, which take the matrix over; `name` is the layer, for messages.

        Raises:
            NumericsError: NaN or inf among the activations.
        """
        count = (self.weight or 1.0) if self.weighted else max(self.n, 1)
        effective = self.weight**2 / (self.squares or 1.0) if self.weighted else None
        mirror_(self.gram)
        result = Statistics(self.n, self.gram.div_(count), self.absolute / count, self.total / count, effective)
        if not torch.isfinite(result.gram).all():
            raise NumericsError(
                f"the input of {name} holds NaN or inf during calibration",
                hint="the model may overflow in this dtype: try --dtype float32",
            )
        return result


def output_loss(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row, `[out]`: diag(D H Dᵀ) for D `[out, in]`, H `[in, in]`."""
    return torch.linalg.vecdot(times_symmetric(error, gram), error)
