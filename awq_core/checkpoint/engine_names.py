"""What engines call the modules of a checkpoint, where they call them otherwise: more for `modules_to_not_convert`.

    model.visual                      visual                            vLLM and SGLang, models of several components
    self_attn.q_proj, k_proj, v_proj  self_attn.qkv_proj                SGLang: a fused linear goes by its own name
    mlp.gate_proj, up_proj            mlp.gate_up_proj

Both look for an entry anywhere in a module's name. vLLM renames the entries as it renames tensors, but its rule for
"model.visual.blocks.0..." makes no "visual" of "model.visual"; and it looks for the parts of a fused linear as well.
"""

from __future__ import annotations

from collections.abc import Iterable

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def with_engine_names(kept: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The prefixes `kept`, each once, and after them what else engines call them.

    Args:
        quantized: names of the quantized linears; no name is added that occurs in one of these.
    """
    names = dict.fromkeys(kept)
    text = "\n".join(quantized)
    more = [name.removeprefix("model.") for name in names if name.startswith("model.") and name.count(".") == 1]
    for fused, parts in FUSED.items():
        parents = [name.removesuffix(parts[0]) for name in names if name.endswith(f".{parts[0]}")]
        more += [parent + fused for parent in parents if all(parent + part in names for part in parts)]
    return list(names | dict.fromkeys(name for name in more if name not in text))
