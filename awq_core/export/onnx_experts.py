"""A mixture of experts in ONNX: an expert is computed only where some token was sent to it.

    out = Σ_e  If(any token chose e)  then  g_e · expert_e(x)  else  0        g_e(t) = 0 for tokens that did not

`If` is a node of the graph, made by `torch.cond`: a single token runs the k experts that it chose, and reads nothing of
the others. Of a prompt, an expert that is needed at all is computed for every token, since the graph's shapes do not
depend on values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from awq_core.modules import UnstackedExperts

Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class BranchingExperts(nn.Module):
    """Called as `UnstackedExperts` is: x `[T, H]`, chosen experts and their weights `[T, k]` -> `[T, H]`."""

    def __init__(self, experts: UnstackedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.experts.num_experts):
            chosen = top_k_index == expert
            gate = (top_k_weights * chosen).sum(-1).to(hidden_states.dtype)
            out = out + torch.cond(chosen.any(), self._weighted(expert), _none, (hidden_states, gate))
        return out

    def _weighted(self, expert: int) -> Branch:
        # The number is a default: one that is enclosed torch takes for a symbol, from the second on.
        def weighted(x: torch.Tensor, gate: torch.Tensor, expert: int = expert) -> torch.Tensor:
            return self.experts.run_expert(expert, x) * gate[:, None]

        return weighted


def _none(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def branch_experts(model: nn.Module) -> None:
    """Replace the experts of every mixture of a model, in place."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, UnstackedExperts)]
    for path, module in found:
        model.set_submodule(path, BranchingExperts(module))
