"""The values plugins exchange with the core. Pure data: frozen, keyword-only, and free of torch.

Paths are dotted module names. In a `ScaleGroup` they are relative to one block (decoder layer), so the same few
lines describe every layer of a model, and mixed stacks (dense beside mixture-of-experts) cannot be confused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["quantize", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStack:
    """A list of blocks that belong to one component.

    Attributes:
        component: "language", "vision", "projector", ...
        blocks: dotted path, from the model, of the `ModuleList` that holds the blocks, or of one module that is
            treated as a stack of a single block (a projector, say).
        prelude: paths of modules whose weights are read before block 0 without their `forward` being called.
            Everything that is called (embeddings, rotary tables, masks) is found by itself and need not be named.
        groups_from: name of the sub-config ("text_config") whose `model_type` owns the scale groups and the fused
            blocks. A vision-language plugin sets it so that those of its language model come from the text model's.
    """

    component: str
    blocks: str
    prelude: tuple[str, ...] = ()
    groups_from: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleGroup:
    """The linears that read one tensor, and the operation before them that absorbs 1/s.

    Multiplying the input columns of every reader by s and dividing the output of `prev` by s leaves the block's
    function unchanged, which is what lets AWQ protect salient channels at no cost at run time.

    Attributes:
        prev: path of the norm or linear that writes the tensor; "" where there is none that could be divided (the
            readers take a residual as it is). They have no scales then, and still share one fate and `no_clip`.
        layers: paths of the linears that read it; globs are allowed ("mlp.experts.*.gate_proj"). A `*` matches one
            path segment; where `prev` holds one too, the group repeats once per match (per-expert up -> down).
        compensate: readers of the same tensor that are multiplied by s but never quantized (mixture-of-experts
            router, shared-expert gate). Their `weight` is `[..., in]`.
        no_clip: members of `layers` whose range is never clipped: query and key, whose outputs meet in a product.
        observe: module whose input is recorded, if not the first of `layers`.
        norm_offset: 1.0 for norms that multiply by `1 + weight` (Gemma), else 0.0.
        prev_rows: "all"; "last" where only the last rows of `prev` feed the readers (fused qkv, fused gate_up); "heads"
            where a fused qkv goes head by head and the values are the last rows of each key-value head's part;
            "kv_heads" where a linear writes keys and values alone, head by head, the values last in each (MLA).
        optional: the group may be absent from a block (hybrid and dense/MoE stacks).
        head_dim: path of the attribute that holds the channels of one head ("self_attn.head_dim"), for a value linear
            whose heads each serve several consecutive query heads. Those then have the same scales. A fused qkv with
            it has (query + 2 · key-value heads) · head_dim rows, so how many of them are values is known. Also for a
            norm that works head by head with one weight for all: its readers then have the same scales in each head.
        degree: n where what stands between `prev` and the readers gives a(x / t) = a(x) / tⁿ for t > 0: 1 for nothing,
            a product with another tensor, or ReLU; 2 for the square of ReLU. `prev` is then divided by the n-th root.
    """

    prev: str
    layers: tuple[str, ...]
    compensate: tuple[str, ...] = ()
    no_clip: tuple[str, ...] = ()
    observe: str | None = None
    norm_offset: float = 0.0
    prev_rows: Literal["all", "last", "heads", "kv_heads"] = "all"
    optional: bool = False
    head_dim: str = ""
    degree: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPolicy:
    """What happens to one component by default, and why. The user's `--component` overrides it.

    Attributes:
        component: "language", "vision", "projector", ...
        action: "quantize" or "keep".
        bits: bit width where it differs from the configuration's.
        group_size: group size where it differs from the configuration's.
        reason: shown in plans and in the model card.
    """

    component: str
    action: Action
    bits: int | None = None
    group_size: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBlock:
    """A run-time replacement of several modules by one faster module; never stored in a checkpoint.

    Attributes:
        match: path, relative to the block, of the module that is replaced; globs allowed; "" is the block itself.
        parts: paths, relative to `match`, of the quantized linears that are merged into one; they read one tensor.
        factory: "module:attribute", called with the module, the merged linear (None without parts) and a mapping from
            each part to its output features; returns the replacement, which may be the module itself, or raises
            `awq_core.modules.NotFusedError`.
        min_capability: lowest CUDA compute capability (75, 80, 90, ...), 0 for any device.
        name: what the report calls it; `match` where it is empty.
    """

    match: str
    parts: tuple[str, ...]
    factory: str
    min_capability: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBackend:
    """One implementation of the int4 linear.

    Attributes:
        name: what `AWQ_KERNEL` calls it.
        formats: checkpoint formats it reads ("gemm").
        devices: torch device types ("cpu", "cuda").
        min_capability: lowest CUDA compute capability, 0 for any.
        factory: "module:attribute" of an object with the methods of `awq_core.kernels.Kernel`.
        priority: the highest that supports the case wins; ties go to the first name in alphabetical order.
    """

    name: str
    formats: tuple[str, ...]
    devices: tuple[str, ...]
    factory: str
    min_capability: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture family: which models it claims, where their blocks are, and what scales with what.

    Attributes:
        family: entry-point name ("falcon").
        model_types: values of `config.model_type` it claims.
        class_names: values of `config.architectures` it claims; beats a claim by model type.
        requires: PEP 508 requirements checked before the model is opened ("transformers>=5.2").
        auto_module: module imported just before such a checkpoint is opened; it registers an in-house configuration
            and model class with transformers' Auto classes.
        stacks: where the blocks are.
        scale_groups: the groups of a block of the language stack; override `awq_scale_groups` where data cannot say it.
        components: default policy per component; empty means quantize "language", keep the rest.
        fused: run-time replacements.
        exempt: globs (relative to a block) of linears that are quantized without a scale group. Write the reason in a
            comment beside each.
        keep: globs (relative to a block) of linears that are never quantized, because the model reads their weight
            instead of calling them.
    """

    family: str
    model_types: tuple[str, ...]
    stacks: tuple[LayerStack, ...]
    scale_groups: tuple[ScaleGroup, ...] = ()
    class_names: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    auto_module: str | None = None
    components: tuple[ComponentPolicy, ...] = ()
    fused: tuple[FusedBlock, ...] = ()
    exempt: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
