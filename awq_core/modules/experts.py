"""Stacked experts as linears.

transformers 5 keeps a layer's experts in two 3-D parameters, `gate_up_proj [E, 2·I, H]` and `down_proj [E, H, I]`,
while checkpoints (and every engine that loads them) store one linear per expert. Quantizers see `nn.Linear`s, so a
plugin replaces the stack by this module, whose linears carry their on-disk names: `experts.<e>.<name>.weight`.

    out[t] = Σ_e∈top-k(t)  g_e(t) · down_e( act(gate_e x_t) · up_e x_t )
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from awq_core.checkpoint.stacks import Piece


class UnstackedExperts(nn.Module):
    """Same call as the stacked module: `forward(x [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`.

    Attributes:
        calibrating: names of the experts ("0", "1", ...) whose linears' inputs are being recorded. While there are any,
            these run on every token, even where the router sends them none, the others not at all, and what is
            returned means nothing.
        together: the three linears of all experts at once, called with the experts chosen for each token, where the
            kernel has that (`runtime.grouped`); for inference.
        stored: which piece of which stack each parameter is, for checkpoints that hold the stacks.
        apply_gate: makes the inner activations of both parts' outputs joined as the stack has them, where that is not
            act_fn(gate) · up; `interleaved` says how they are joined: g, u, g, u, ... or all of one first.
    """

    together: nn.ModuleList | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Any,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        gate, up, down = names
        self.names = tuple(names)
        self.num_experts = num_experts
        self.act_fn = act_fn
        self.calibrating: Collection[str] = ()
        self.together = None
        self.stored: dict[str, Piece] = {}
        self.apply_gate: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.interleaved = False
        for expert in range(num_experts):
            linears = {
                gate: nn.Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device),
                up: nn.Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device),
                down: nn.Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device),
            }
            self.add_module(str(expert), nn.ModuleDict(linears))

    def run_expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on rows `[T, H]`."""
        gate, up, down = (self.get_submodule(f"{expert}.{name}") for name in self.names)
        return down(self.combine(gate(x), up(x)))

    def combine(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Inner activations `[T, I]` of what gate and up gave."""
        if self.apply_gate is None:
            return self.act_fn(gate) * up
        joined = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        return self.apply_gate(joined)

    def gate_weights(
        self, expert: str, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """g_e(t) for one expert, `[T]`: what its output is multiplied by; 0 for rows that go elsewhere."""
        return (top_k_weights * (top_k_index == int(expert))).sum(-1)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.together and not self.calibrating and not torch.is_grad_enabled():
            gate, up, down = self.together
            inner = self.combine(gate(hidden_states, top_k_index), up(hidden_states, top_k_index))
            rows = down(inner, top_k_index).unflatten(0, top_k_index.shape)
            return (rows * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)
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
    model: nn.Module,
    suffix: str,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
) -> bool:
    """Replace every stacked experts module whose path ends in `suffix` ("mlp.experts"), in place.

    Works on the meta device; the new linears keep the stack's device and dtype, and its values where it has any. What
    transformers says of the layout is followed: inputs first, gate and up interleaved, biases, another gating. Where a
    checkpoint holds the stacks, each expert is read out of them.

    Returns:
        Whether anything was replaced.
    """
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if (path == suffix or path.endswith("." + suffix)) and getattr(module, "gate_up_proj", None) is not None
    ]
    for path, module in stacks:
        experts = _taken_apart(module, names)
        for name, piece in experts.stored.items():
            stack = getattr(module, piece.stack)
            if stack.device.type != "meta":
                experts.get_parameter(name).data.copy_(piece.cut(stack.data[piece.expert]))
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, experts.train(module.training))
        module._parameters.clear()  # `apply_gate` may hold on to the module
    return bool(stacks)


def _taken_apart(module: Any, names: Sequence[str]) -> UnstackedExperts:
    """Linears for a stack, without its values."""
    gate_up, bias = module.gate_up_proj, bool(getattr(module, "has_bias", False))
    turned, interleaved = getattr(module, "is_transposed", False), not getattr(module, "is_concatenated", True)
    count, *rest = gate_up.shape
    hidden, double = rest if turned else reversed(rest)
    act_fn = getattr(module, "act_fn", None)
    experts = UnstackedExperts(
        count, hidden, double // 2, act_fn, names, dtype=gate_up.dtype, device=gate_up.device, bias=bias
    )
    experts.requires_grad_(False)
    own = getattr(module, "_apply_gate", None)
    if own is not None and own.__name__ != "_default_apply_gate":
        experts.apply_gate, experts.interleaved = own, interleaved
    inner = double // 2
    gates, ups = ((0, None, 2), (1, None, 2)) if interleaved else ((0, inner, 1), (inner, None, 1))
    stacks = ("gate_up_proj", "gate_up_proj", "down_proj")
    for name, stack, (first, end, step) in zip(names, stacks, (gates, ups, (0, None, 1)), strict=True):
        for expert in range(count):
            experts.stored[f"{expert}.{name}.weight"] = Piece(stack, expert, first, end, step, turned)
            if bias:
                experts.stored[f"{expert}.{name}.bias"] = Piece(f"{stack}_bias", expert, first, end, step)
    return experts
