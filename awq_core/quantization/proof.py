"""The proof that a plugin's scale groups are right, before any weight is touched.

On a tiny, randomly initialised model of the same class, random scales are folded into every group. If the groups are
right the outputs do not move:

    || f(folded) − f(original) || / || f(original) ||  <=  1e-4        (fp32)

This catches what no shape check can: a reader of a norm that was left out (0.41 on a parallel-attention block), a norm
that multiplies by 1 + w (0.07), a router that reads the scaled tensor (0.3 to 0.5), a fused qkv whose last rows are not
the values (0.26).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from awq_core.errors import AwqError, PlanError
from awq_core.hooks.manager import Owner, PluginManager
from awq_core.planning import manager_groups, stack_blocks
from awq_core.quantization.fold import apply_to_block
from awq_core.quantization.shrink import shrunken
from awq_core.scale_groups import GroupPlan, resolve_groups
from awq_core.skeleton import build_skeleton, set_parameter

TOLERANCE = 1e-4
TOKENS = 12
VOCABULARY = 64


@dataclass(frozen=True, slots=True)
class Proof:
    """Outcome: relative output change, and how many groups were folded. `proved` says whether the groups are right."""

    error: float
    groups: int

    @property
    def proved(self) -> bool:
        return self.error <= TOLERANCE


def prove(
    config: PretrainedConfig,
    owner: Owner,
    manager: PluginManager,
    *,
    fold_previous: bool = True,
    only: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Proof:
    """Fold random scales into every group of a tiny instance of `config` and measure how far the outputs move.

    Args:
        fold_previous: False scales the readers only: the negative control, whose error must be large.
        only: index of the one group to fold, counted over all blocks; default all.

    Raises:
        PlanError: a declared path matches nothing.
    """
    model = tiny_model(config, owner, manager, seed=seed, trust_remote_code=trust_remote_code)
    return prove_model(model, owner, manager, fold_previous=fold_previous, only=only, seed=seed)


def prove_model(
    model: nn.Module,
    owner: Owner,
    manager: PluginManager,
    *,
    fold_previous: bool = True,
    only: int | None = None,
    seed: int = 0,
) -> Proof:
    """`prove` on a model that is there already; its weights are changed."""
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = list(sample_batches(model, generator))
    with torch.no_grad():
        before = [logits_of(model, batch) for batch in inputs]
        groups = list(resolved(model, owner, manager))
        for index, (block, group) in enumerate(groups):
            width = block.get_parameter(f"{group.layers[0]}.weight").shape[1]
            scale = torch.exp(0.7 * torch.randn(width, generator=generator))
            if only is None or index == only:
                apply_to_block(block, group, scale, fold_previous=fold_previous)
        after = [logits_of(model, batch) for batch in inputs]
    errors = [(a - b).norm() / b.norm() for a, b in zip(after, before, strict=True)]
    error = float(torch.stack(errors).max())  # Python's own max would lose a NaN
    return Proof(error, len(groups))


def require_proof(config: PretrainedConfig, owner: Owner, manager: PluginManager, **options: Any) -> Proof:
    """`prove`, and refuse a plugin whose groups change the function, naming the first group that does.

    Raises:
        PlanError: the groups are wrong.
    """
    proof = prove(config, owner, manager, **options)
    if proof.proved:
        return proof
    guilty = next((i for i in range(proof.groups) if not prove(config, owner, manager, only=i, **options).proved), 0)
    trust = bool(options.get("trust_remote_code", False))
    model = tiny_model(config, owner, manager, trust_remote_code=trust)
    block, group = list(resolved(model, owner, manager))[guilty]
    path = next(name for name, module in model.named_modules() if module is block)
    raise PlanError(
        f"{owner.dist} {owner.version}: scaling {path}: {group.prev} -> {', '.join(group.layers)} changes the model's "
        f"function (relative error {proof.error:.2g})",
        hint=f"is every reader of {group.prev} listed, and norm_offset right? Nothing was quantized",
    )


def tiny_model(
    config: PretrainedConfig,
    owner: Owner,
    manager: PluginManager,
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A small model of the same class with random weights, norms and biases, fp32, prepared by its plugin."""
    failure: Exception | None = None
    for candidate in shrunk(config):
        try:
            model = build_skeleton(candidate, trust_remote_code=trust_remote_code)
            manager.prepare_model(owner, model)
            randomise(model, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                logits_of(model, next(sample_batches(model, torch.Generator().manual_seed(0))))
            return model
        except AwqError:
            raise
        except Exception as error:
            failure = error
    line = next(iter(str(failure).strip().splitlines()), "") or type(failure).__name__
    raise PlanError(f"no tiny {config.model_type} model could be built: {line}") from failure


def shrunk(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Smaller versions of a configuration, smallest first: narrow and shallow, then shallow only; in between, every
    width divided alike (shrink.py), for configurations whose fields have other names.

    Ratios that matter survive (query heads to key-value heads, dense to mixture layers). A custom configuration whose
    fields have other names is still proved, at its own width and two layers deep.
    """
    narrow = copy.deepcopy(config)
    try:
        _shrink(narrow, width=True)
    except Exception:  # a configuration that checks its own fields, or has some that differ by layer
        pass
    else:
        yield narrow
    yield from shrunken(config)
    shallow = copy.deepcopy(config)
    _shrink(shallow, width=False)
    yield shallow


def _shrink(config: Any, *, width: bool) -> None:
    for name in getattr(config, "sub_configs", None) or ():
        sub = getattr(config, name, None)
        if sub is not None:
            _shrink(sub, width=width)

    def get(name: str) -> Any:
        return getattr(config, name, None)

    depth = get("num_hidden_layers")
    if isinstance(depth, int) and depth > 2:
        kinds = get("layer_types")
        own = depth - (get("num_kv_shared_layers") or 0)
        keep = _first_of_each(kinds, own)
        if own < depth:  # the layers at the end that take keys and values from those before
            shared = [own + i for i in _first_of_each(kinds[own:] if kinds else None, depth - own)]
            config.num_kv_shared_layers, keep = len(shared), keep + shared
        config.num_hidden_layers = len(keep)
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == depth:  # one entry a layer
                setattr(config, name, [value[i] for i in keep])
    if not width:
        return
    kv_name = "num_key_value_heads" if get("num_key_value_heads") is not None else "num_kv_heads"
    heads, kv = get("num_attention_heads"), get(kv_name)
    hidden = get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    few = 2 * max(1, heads // kv) if isinstance(kv, int) and kv < heads else 4
    if few < heads:
        config.num_attention_heads = few
        if isinstance(kv, int):
            setattr(config, kv_name, few if kv == heads else 2)
        if isinstance(get("head_dim"), int):
            with suppress(AttributeError):  # where it follows from the other two
                config.head_dim = 16
        config.hidden_size = 16 * few
    for name, value in (
        ("intermediate_size", 96),
        ("ffn_hidden_size", 96),
        ("ffn_dim", 96),
        ("n_inner", 96),
        ("rotary_dim", 8),
        ("moe_intermediate_size", 48),
        ("shared_expert_intermediate_size", 80),
        ("vocab_size", VOCABULARY),
        ("vocab_size_per_layer_input", VOCABULARY),
        ("num_experts", 4),
        ("num_local_experts", 4),
    ):
        if isinstance(get(name), int) and get(name) > value:
            setattr(config, name, value)
        elif isinstance(get(name), list):
            setattr(config, name, [min(each, value) for each in get(name)])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if get(name) is not None:
            setattr(config, name, None)
    rope = get("rope_parameters") or {}
    if isinstance(rope, dict) and rope.get("mrope_section"):
        config.rope_parameters = {**rope, "mrope_section": [2, 3, 3]}
    if isinstance(rope, dict) and rope.get("short_factor"):  # one factor for each two channels that rotate
        half = int((get("head_dim") or 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        factors = {name: rope[name][:half] for name in ("short_factor", "long_factor")}
        config.rope_parameters = {**rope, **factors}


def _first_of_each(kinds: Any, depth: int) -> list[int]:
    """Indices of two of the first `depth` layers of each kind (or the first two layers), in order."""
    if not isinstance(kinds, list):
        return list(range(min(depth, 2)))
    chosen: list[int] = []
    for kind in dict.fromkeys(kinds[:depth]):
        chosen += [i for i, k in enumerate(kinds[:depth]) if k == kind][:2]
    return sorted(chosen)


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Values in which no norm is one and no bias zero, scaled so that activations stay of order one."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                value = noise / parameter.shape[-1] ** 0.5
            elif name == "weight":
                value = 1 + 0.3 * noise
            else:
                value = 0.2 * noise
            set_parameter(module, name, value)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def sample_batches(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Two batches: one plain, one longer and left-padded."""
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    limit = min(VOCABULARY, getattr(text, "vocab_size", VOCABULARY)) - 1
    yield {"input_ids": torch.randint(1, limit, (2, TOKENS), generator=generator)}
    mask = torch.ones(2, TOKENS + 5, dtype=torch.long)
    mask[0, :4] = 0
    yield {"input_ids": torch.randint(1, limit, (2, TOKENS + 5), generator=generator), "attention_mask": mask}


def logits_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch, use_cache=False).logits.float()
    mask = batch.get("attention_mask")
    return logits if mask is None else logits[mask.bool()]


def resolved(model: nn.Module, owner: Owner, manager: PluginManager) -> Iterator[tuple[nn.Module, GroupPlan]]:
    for stack in manager.layer_stacks(owner, model):
        for path, block, index in stack_blocks(model, stack):
            declared = manager_groups(manager, owner, model, stack, block, index)
            for group in resolve_groups(block, declared, where=path)[0]:
                yield block, group
