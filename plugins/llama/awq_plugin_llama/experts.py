"""Llama 4's experts: the router's score multiplies what an expert reads, not what it writes.

    out[t] = shared(x_t) + Σ_e∈top-k(t)  E_e( σ(r_e(t)) · x_t )            r = router x

A number a token commutes with scales a channel, so the groups are those of any mixture. But an expert is not linear:
statistics must be of inputs with their score. transformers calls the stacked experts with all tokens once for each
expert, zeros where the score counts as none; here they get the tokens, the choice and every score, so that an expert
can be calibrated on tokens that the router sent elsewhere as well, with the score it had for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from awq_core.modules import UnstackedExperts, unstack_experts
from awq_core.modules.fusing import specialise


class ScoredExperts(UnstackedExperts):
    """Linears of the experts; inputs are multiplied by their score."""

    def gate_weights(
        self, expert: str, hidden_states: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """1 for tokens that go to this expert, else 0, `[T]`: its output is added as it is."""
        return (chosen == int(expert)).any(-1).to(hidden_states.dtype)

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """x `[T, H]`, experts of each token `[T, k]`, scores of all `[T, E]` -> `[T, H]`."""
        if self.together and not self.calibrating and not torch.is_grad_enabled():
            gate, up, down = self.together
            rows = (hidden_states[:, None] * scores.gather(1, chosen)[..., None]).flatten(0, 1)
            inner = self.combine(gate(rows, chosen), up(rows, chosen))
            return down(inner, chosen).unflatten(0, chosen.shape).sum(1)
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            if self.calibrating:
                if str(expert) in self.calibrating:
                    self.run_expert(expert, hidden_states * scores[:, expert, None])
                continue
            token = torch.where(chosen == expert)[0]
            if token.numel():
                out.index_add_(0, token, self.run_expert(expert, hidden_states[token] * scores[token, expert, None]))
        return out


class ScoredMixture:
    """The mixture with such experts in it."""

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[..., H]` -> `[T, H]` and the router's logits `[T, E]`, as transformers' own."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = self.router(x)[1]
        chosen = logits.topk(self.top_k, dim=1).indices
        scores = logits.float().sigmoid().to(x.dtype)
        return self.shared_expert(x) + self.experts(x, chosen, scores), logits


def unstack_scored(model: nn.Module) -> bool:
    """Take every mixture's experts apart, in place; says whether there were any. Stacks are `[E, in, out]`."""
    mixtures: list[Any] = [one for path, one in model.named_modules() if hasattr(one, "experts")]
    for mixture in mixtures:
        mixture.experts.is_transposed = True
        unstack_experts(mixture, "experts")
        mixture.experts.__class__ = ScoredExperts
        specialise(mixture, ScoredMixture)
    return bool(mixtures)
