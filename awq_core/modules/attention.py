"""Attention over a cache, with the kernels of `kernels.blocks`, through transformers' own extension points.

Masks, rope scaling, windows, padding and the cache stay transformers'. Two things are replaced, each by itself:

- `decode_attention`: one new token over all that the cache holds, as an entry in transformers' table of attention
  functions beside "sdpa". It gets the tensors and the mask that sdpa gets and hands every other call on to sdpa.
- `rotate_into_cache`: the rotation of q and k and the write into a pre-allocated cache as one kernel, in attention
  modules whose `forward` is the common one. Everything else, a cache that slides or grows, goes the class's own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from awq_core.kernels import blocks
from awq_core.modules.fusing import NotFusedError, forward_of, require_code, require_kernels, specialise, statements
from awq_core.modules.norms import RMS_NORM

NAME = "awq"
# What sdpa takes beside these changes its result, and the kernel does not know it.
HARMLESS = {"sliding_window", "position_ids", "use_cache", "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k"}

COMMON = """
input_shape = hidden_states.shape[:-1]
hidden_shape = (*input_shape, -1, self.head_dim)
query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
cos, sin = position_embeddings
query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
if past_key_values is not None:
    key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
attn_output, attn_weights = attention_interface(
    self, query_states, key_states, value_states, attention_mask,
    dropout=0.0 if not self.training else self.attention_dropout, scaling=self.scaling, **kwargs)
attn_output = attn_output.reshape(*input_shape, -1).contiguous()
attn_output = self.o_proj(attn_output)
return (attn_output, attn_weights)
"""
# Norms of each head, and a window that sdpa's mask holds already, are the differences between families.
HEAD_NORMS = tuple(
    (
        f"self.{x}_norm(self.{x}_proj(hidden_states).view(hidden_shape))",
        f"self.{x}_proj(hidden_states).view(hidden_shape)",
    )
    for x in "qk"
)
WINDOWS = (", sliding_window=self.sliding_window", ", sliding_window=getattr(self.config, 'sliding_window', None)")

ROTARY = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
return (q_embed, k_embed)
"""
ROTATE_HALF = """
x1 = x[..., :x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2:]
return torch.cat((-x2, x1), dim=-1)
"""


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query `[B, Hq, T, D]`, key and value `[B, Hkv, L, D]` -> `[B, T, Hq, D]`."""
    unknown = any(value is not None for name, value in kwargs.items() if name not in HARMLESS)
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if query.shape[2] == 1 and one_mask and not dropout and not unknown and not torch.is_grad_enabled():
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return blocks.decode_attention(query, key, value, attention_mask, scale).transpose(1, 2), None
    out: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


def decode_attention(module: nn.Module, merged: nn.Module | None, sizes: Mapping[str, int]) -> nn.Module:
    """Factory of a fused block: attention modules that use sdpa use the function above. It is the configuration they
    share that says so, so the first one changes it for all.

    Raises:
        NotFusedError: no Triton kernels here, or the model's attention is not sdpa's.
    """
    require_kernels(module)
    config: Any = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", NAME):
        raise NotFusedError(f"attention is {implementation}, not sdpa")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return module


class RotaryIntoCache:
    """Attention whose rotation writes k and v straight into a pre-allocated cache."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = _preallocated(past_key_values, self.layer_idx)
        implementation = self.config._attn_implementation
        if layer is None or implementation not in ("sdpa", NAME) or torch.is_grad_enabled():
            return super().forward(  # type: ignore[misc]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        rows = hidden_states.shape[:-1]
        q, k, v = (
            linear(hidden_states).view(*rows, -1, self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        # As StaticLayer.update does: the cells after those in use, whose count is a tensor that graphs change in place.
        positions = torch.arange(rows[1], device=q.device) + layer.cumulative_length
        layer.cumulative_length.add_(rows[1])
        cos, sin = position_embeddings
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        q = blocks.rotate_and_store(q, k, v, cos, sin, layer.keys, layer.values, positions)
        out, weights = ALL_ATTENTION_FUNCTIONS[implementation](
            self, q, layer.keys, layer.values, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*rows, -1).contiguous()), weights


def _preallocated(cache: Any, index: int) -> StaticLayer | None:
    """The layer of a cache that is allocated, does not slide and is on its device; else None."""
    if cache is None or getattr(cache, "offloading", False) or index >= len(getattr(cache, "layers", ())):
        return None
    layer = cache.layers[index]
    return layer if type(layer) is StaticLayer and layer.is_initialized else None


def rotate_into_cache(module: nn.Module, merged: nn.Module | None, sizes: Mapping[str, int]) -> nn.Module:
    """Factory of a fused block: the attention module itself, with the forward above.

    Raises:
        NotFusedError: no Triton kernels here, or the module's forward, its rotary or its norms are not the common ones.
    """
    require_kernels(module)
    name, code = f"{type(module).__name__}.forward", forward_of(module)
    for window in WINDOWS:
        code = code.replace(window, "")
    has_norms = all(normed in code for normed, _ in HEAD_NORMS)
    for normed, plain in HEAD_NORMS if has_norms else ():
        code = code.replace(normed, plain)
    require_code(name, code, COMMON)
    if has_norms != hasattr(module, "q_norm"):
        raise NotFusedError(f"{name} does not use its norms")
    for norm in ("q_norm", "k_norm") if has_norms else ():
        require_code(norm, forward_of(module.get_submodule(norm)), RMS_NORM)
    beside = getattr(type(module).forward, "__globals__", {})
    rotary = beside.get("apply_rotary_pos_emb")
    require_code("apply_rotary_pos_emb", statements(rotary) if rotary else "", ROTARY)
    half = getattr(rotary, "__globals__", {}).get("rotate_half")
    require_code("rotate_half", statements(half) if half else "", ROTATE_HALF)
    return specialise(module, RotaryIntoCache)
