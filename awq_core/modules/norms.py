"""A pre-norm decoder block whose residual sums run in the pass of the norm that follows.

h = x + attention(norm₁(x)),   y = h + mlp(norm₂(h)):        h and norm₂(h) come from one kernel
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from awq_core.kernels.blocks import rms_norm
from awq_core.modules.fusing import forward_of, require_code, require_kernels, specialise

RMS_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""

PRE_NORM_BLOCK = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(
    hidden_states=hidden_states,
    attention_mask=attention_mask,
    position_ids=position_ids,
    past_key_values=past_key_values,
    use_cache=use_cache,
    position_embeddings=position_embeddings,
    **kwargs,
)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""
# Some let `use_cache` pass among the rest.
PRE_NORM_BLOCKS = (PRE_NORM_BLOCK, PRE_NORM_BLOCK.replace("    use_cache=use_cache,\n", ""))


def norm_of(module: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """`rms_norm` with the weight and the epsilon of an RMSNorm of transformers'."""
    return rms_norm(x, module.weight, float(module.variance_epsilon), residual=residual)  # type: ignore[arg-type]


class ResidualNorms:
    """A decoder block with its norms, and the residual sum before the second, in one kernel each."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        options = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if torch.is_grad_enabled():  # the kernels are for inference
            return super().forward(hidden_states, **options)  # type: ignore[misc]
        normed, _ = norm_of(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **options)
        normed, total = norm_of(self.post_attention_layernorm, attended, hidden_states)
        result: torch.Tensor = total + self.mlp(normed)
        return result


def fuse_norms(block: nn.Module, merged: nn.Module | None, sizes: Mapping[str, int]) -> nn.Module:
    """Factory of a fused block: the decoder block itself, with the forward above.

    Raises:
        NotFusedError: no Triton kernels here, or the block's forward or its norms' is not the one above.
    """
    require_kernels(block)
    require_code(f"{type(block).__name__}.forward", forward_of(block), *PRE_NORM_BLOCKS)
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = block.get_submodule(name)
        require_code(f"{type(norm).__name__}.forward", forward_of(norm), RMS_NORM)
    return specialise(block, ResidualNorms)
