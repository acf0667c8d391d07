"""Scale groups, policies and fused blocks that many families share, as data. No plugin imports another plugin.

    norm --> q, k, v        v --> o        norm --> gate, up        up --> down

The last holds because the block computes `down(act(gate(x)) * up(x))`: dividing `up`'s rows divides `down`'s input.
"""

from awq_core.hooks.types import ComponentPolicy, FusedBlock, ScaleGroup


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


def latent_attention(norm: str = "input_layernorm", *, attn: str = "self_attn") -> tuple[ScaleGroup, ...]:
    """Multi-head latent attention: norm -> q_a, kv_a; each latent's norm -> its second linear; kv_b -> o.

        q = q_b(norm(q_a x)), or q_proj x      k, v = kv_b(norm(c)), with c, k's rotated part = kv_a x

    The latents' norms divide by the size of what they read, so nothing folds into q_a and kv_a. kv_b writes keys and
    values head by head; the values are the last `v_head_dim` rows of each."""
    kv_a, kv_b = f"{attn}.kv_a_proj_with_mqa", f"{attn}.kv_b_proj"
    return (
        ScaleGroup(prev=norm, layers=(f"{attn}.q_proj", kv_a), optional=True),
        ScaleGroup(prev=norm, layers=(f"{attn}.q_a_proj", kv_a), optional=True),
        ScaleGroup(prev=f"{attn}.q_a_layernorm", layers=(f"{attn}.q_b_proj",), optional=True),
        ScaleGroup(prev=f"{attn}.kv_a_layernorm", layers=(kv_b,)),
        ScaleGroup(prev=kv_b, layers=(f"{attn}.o_proj",), prev_rows="kv_heads", head_dim=f"{attn}.v_head_dim"),
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
    norm_offset: float = 0.0,
    optional: bool = False,
) -> tuple[ScaleGroup, ...]:
    """norm -> every expert's gate and up, and the shared expert's; then up -> down within each expert. The router
    and the shared expert's gate read the same norm, so they are compensated."""
    readers = [f"{experts}.*.{gate}", f"{experts}.*.{up}"]
    if shared:
        readers += [f"{shared}.{gate}", f"{shared}.{up}"]
    compensate = (router, shared_gate) if shared_gate else (router,)
    groups = [
        ScaleGroup(prev=norm, layers=tuple(readers), compensate=compensate, norm_offset=norm_offset, optional=optional),
        ScaleGroup(prev=f"{experts}.*.{up}", layers=(f"{experts}.*.{down}",), optional=optional),
    ]
    if shared:
        groups.append(ScaleGroup(prev=f"{shared}.{up}", layers=(f"{shared}.{down}",), optional=optional))
    return tuple(groups)


LLAMA_BLOCK = (*attention(), *gated_mlp())

# Of a language model with eyes: the tower and what leads from it stay as they are.
LANGUAGE_ALONE = (
    ComponentPolicy(component="language", action="quantize"),
    ComponentPolicy(component="vision", action="keep", reason="a few percent of the weights, and sensitive"),
    ComponentPolicy(component="projector", action="keep", reason="every image token passes through it"),
)

# What replaces a forward or an operation runs on Triton's kernels, from this compute capability on.
TRITON = 80


def fused_attention(attn: str = "self_attn") -> tuple[FusedBlock, ...]:
    """One product for q, k and v; rotation straight into a pre-allocated cache; attention of one new token. The last
    two check that the module computes what they stand in for, and leave it alone where it does not."""
    where = "awq_core.modules.attention"
    return (
        FusedBlock(
            match=attn,
            parts=("q_proj", "k_proj", "v_proj"),
            factory="awq_core.modules.merged:merge_products",
            name="qkv",
        ),
        FusedBlock(match=attn, parts=(), factory=f"{where}:rotate_into_cache", min_capability=TRITON, name="rotary"),
        FusedBlock(match=attn, parts=(), factory=f"{where}:decode_attention", min_capability=TRITON, name="attention"),
    )


def fused_mlp(mlp: str = "mlp") -> tuple[FusedBlock, ...]:
    """One product for gate and up, and silu(gate) · up within it where the kernel has that."""
    return (
        FusedBlock(
            match=mlp,
            parts=("gate_proj", "up_proj"),
            factory="awq_core.modules.gated:merge_gated",
            name="gate-up",
        ),
    )


def fused_norms() -> tuple[FusedBlock, ...]:
    """RMSNorm, and the residual sum before it, in the usual pre-norm block."""
    factory = "awq_core.modules.norms:fuse_norms"
    return (FusedBlock(match="", parts=(), factory=factory, min_capability=TRITON, name="norms"),)


FUSED_BLOCK = (*fused_attention(), *fused_mlp(), *fused_norms())
