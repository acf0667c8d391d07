"""Stacked experts as linears.

transformers 5 keeps a layer's experts in two 3-D parameters, `gate_up_proj [E, 2·I, H]` and `down_proj [E, H, I]`,
while checkpoints (and every engine that loads them) store one linear per expert. Quantizers see `nn.Linear`s, so a
plugin replaces the stack by this module, whose linears carry their on-disk names: `experts.<e>.<name>.weight`.

    out[t] = Σ_e∈top-k(t)  g_e(t) · down_e( act(gate_e x_t) · up_e x_t )
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn


class UnstackedExperts(nn.Module):
    """Same call as the stacked module: `forward(x [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`.

    Attributes:
        calibrating: names of the experts ("0", "1", ...) whose linears' inputs are being recorded. While there are any,
            these run on every token, even where the router sends them none, the others not at all, and what is
            returned means nothing.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: nn.Module,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        gate, up, down = names
        self.names = tuple(names)
        self.num_experts = num_experts
        self.act_fn = act_fn
        self.calibrating: Collection[str] = ()
        for expert in range(num_experts):
            linears = {
                gate: nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype, device=device),
                up: nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype, device=device),
                down: nn.Linear(intermediate_size, hidden_size, bias=False, dtype=dtype, device=device),
            }
            self.add_module(str(expert), nn.ModuleDict(linears))

    def run_expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on rows `[T, H]`."""
        gate, up, down = (self.get_submodule(f"{expert}.{name}") for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))

    def gate_weights(
        self, expert: str, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """g_e(t) for one expert, `[T]`: what its output is multiplied by; 0 for rows that go elsewhere."""
        return (top_k_weights * (top_k_index == int(expert))).sum(-1)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            if self.calibrating:
                if str(expert) in self.calibrating:
                    self.run_expert(expert, hidden_states)
                continue
            token, slot = torch.where(top_k_index == expert)
            if token.numel():
                rows = self.run_expert(expert, hidden_states[token])
                out.index_add_(0, token, (rows * top_k_weights[token, slot, None]).to(out.dtype))
        return out


def unstack_experts(
    model: nn.Module, suffix: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> bool:
    """Replace every stacked experts module whose path ends in `suffix` ("mlp.experts"), in place.

    Works on the meta device; the new linears keep the stack's device and dtype, and its values where it has any.

    Returns:
        Whether anything was replaced.
    """
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if (path == suffix or path.endswith("." + suffix)) and getattr(module, "gate_up_proj", None) is not None
    ]
    for path, module in stacks:
        gate_up, down = module.gate_up_proj, module.down_proj
        count, double, hidden = gate_up.shape
        experts = UnstackedExperts(
            count, hidden, double // 2, module.act_fn, names, dtype=gate_up.dtype, device=gate_up.device
        )
        for parameter in experts.parameters():
            parameter.requires_grad_(False)
        if gate_up.device.type != "meta":
            _copy_values(experts, gate_up, down)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, experts.train(module.training))
    return bool(stacks)


def _copy_values(experts: UnstackedExperts, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    gate_name, up_name, down_name = experts.names
    for expert in range(experts.num_experts):
        gate, up = gate_up[expert].chunk(2)
        for name, value in ((gate_name, gate), (up_name, up), (down_name, down[expert])):
            experts.get_parameter(f"{expert}.{name}.weight").data.copy_(value)
