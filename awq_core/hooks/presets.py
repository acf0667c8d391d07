"""Scale groups that many families share, as data. Plugins compose them; none imports another plugin.

    norm --> q, k, v        v --> o        norm --> gate, up        up --> down

The last holds because the block computes `down(act(gate(x)) * up(x))`: dividing `up`'s rows divides `down`'s input.
"""

from awq_core.hooks.types import ScaleGroup


def attention(
    norm: str = "input_layernorm", *, attn: str = "self_attn", out: str = "o_proj", norm_offset: float = 0.0
) -> tuple[ScaleGroup, ...]:
    """norm -> q, k, v and v -> o. Under grouped-query attention query heads that share a value head share its scales;
    how wide a head is, the attention's `head_dim` says."""
    q, k, v = (f"{attn}.{name}_proj" for name in "qkv")
    return (
        ScaleGroup(prev=norm, layers=(q, k, v), no_clip=(q, k), norm_offset=norm_offset),
        ScaleGroup(prev=v, layers=(f"{attn}.{out}",), head_dim=f"{attn}.head_dim"),
    )


def gated_mlp(
    norm: str = "post_attention_layernorm", *, mlp: str = "mlp", norm_offset: float = 0.0, optional: bool = False
) -> tuple[ScaleGroup, ...]:
    """norm -> gate, up and up -> down."""
    return (
        ScaleGroup(
            prev=norm, layers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"), norm_offset=norm_offset, optional=optional
        ),
        ScaleGroup(prev=f"{mlp}.up_proj", layers=(f"{mlp}.down_proj",), optional=optional),
    )


def moe_mlp(
    norm: str = "post_attention_layernorm",
    *,
    experts: str = "mlp.experts",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    router: str = "mlp.gate",
    shared: str | None = None,
    shared_gate: str | None = None,
    optional: bool = False,
) -> tuple[ScaleGroup, ...]:
    """norm -> every expert's gate and up, and the shared expert's; then up -> down within each expert. The router
    and the shared expert's gate read the same norm, so they are compensated."""
    readers = [f"{experts}.*.{gate}", f"{experts}.*.{up}"]
    if shared:
        readers += [f"{shared}.{gate}", f"{shared}.{up}"]
    compensate = (router, shared_gate) if shared_gate else (router,)
    groups = [
        ScaleGroup(prev=norm, layers=tuple(readers), compensate=compensate, optional=optional),
        ScaleGroup(prev=f"{experts}.*.{up}", layers=(f"{experts}.*.{down}",), optional=optional),
    ]
    if shared:
        groups.append(ScaleGroup(prev=f"{shared}.{up}", layers=(f"{shared}.{down}",), optional=optional))
    return tuple(groups)


LLAMA_BLOCK = (*attention(), *gated_mlp())
