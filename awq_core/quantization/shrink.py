"""A small configuration of the same shape as a large one, for an architecture nobody has described.

Nothing is known about the fields but their names and values, so one rule scales them all: what a head has is divided
by w, counts of heads by c, all other widths by w · c, powers of two. Sums and products then still agree,

    hidden = heads · head_dim        inner = expand · hidden = n_heads · d_head        rotary_dim <= head_dim

because both sides are divided alike. The depth becomes a few layers: those that repeat in a pattern keep one whole
period, so every kind of block is still there. Which candidate the model class accepts is found by building it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

DIVISORS = (64, 32, 16, 8, 4, 2, 1)
NARROWEST, LEAST = 32, 4  # of the hidden size, and of any other width, such as a head's
DEEPEST = 8
VOCABULARY = 64
EXPERTS = 4

_WIDTH = re.compile(r"(^|_)(sizes?|dims?|rank|width|embd|inner|hidden|channels|ssm|d)($|_)")
_NOT_WIDTH = re.compile(r"vocab|token|window|chunk|patch|image|kernel|group|position|block|batch|num_|conv|pool|type")
_EXPERTS = re.compile(r"^(num|n|moe_num|ffn_num)_(local_|routed_)?experts(_moe)?$")
_OF_A_HEAD = re.compile(r"head|rope|rotary|rank|state")
_HEADS = re.compile(r"(^|_)heads?(_kv)?$")
_PERIOD = re.compile(r"period|interval|every|_step$|_freq$|pattern$")
_CONFIG_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrunken(config: Any) -> Iterator[Any]:
    """Smaller copies of a configuration, smallest first, down to few layers of the original widths. After these come
    the ones in which some width is very narrow."""
    text = _text(config)
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    follows = isinstance(heads, int) and not any("head_dim" in name for name in vars(text) if vars(text)[name])
    for least, fewer in ((LEAST, True), (LEAST, False), (1, False)):
        count = _fewer(text) if fewer else 1
        narrowest = max(NARROWEST, LEAST * (heads or 0) // count) if follows else NARROWEST
        for divisor in DIVISORS:
            all_in_all = divisor * count
            if isinstance(hidden, int) and all_in_all > 1 and (hidden % all_in_all or hidden // all_in_all < narrowest):
                continue
            try:
                small = copy.deepcopy(config)
                _shrink(small, divisor, least, fewer)
            except Exception:  # a configuration that checks its own fields; a milder cut may pass
                continue
            yield small


def _fewer(config: Any) -> int:
    """By what counts of heads can be divided: the largest keep four or more, those that are several stay several."""
    counts = [one for name, one in vars(config).items() if _HEADS.search(name) and isinstance(one, int) and one > 1]
    fits = [c for c in DIVISORS if counts and max(counts) // c >= 4 and all(n % c == 0 and n // c > 1 for n in counts)]
    return max(fits, default=1)


def _text(config: Any) -> Any:
    return getattr(config, "get_text_config", lambda: config)()


def _shrink(config: Any, divisor: int, least: int, fewer: bool) -> None:
    """In place. A width that would fall below `least` stays as it is; a head's raises ValueError."""
    count = _fewer(config) if fewer else 1
    for name in getattr(config, "sub_configs", None) or ():
        sub = getattr(config, name, None)
        if sub is not None and not isinstance(sub, dict):
            _shrink(sub, divisor, least, fewer)
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    _shallow(config, fields)
    for name, value in fields.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            if name == "vocab_size" and value > VOCABULARY:
                config.vocab_size = VOCABULARY
            elif _EXPERTS.search(name) and value > EXPERTS:
                setattr(config, name, EXPERTS)
            elif _HEADS.search(name) and value % count == 0:
                setattr(config, name, value // count)
            elif (
                is_width(name)
                and not _OF_A_HEAD.search(name)
                and value % (divisor * count) == 0
                and value >= (divisor * count * least)
            ):
                setattr(config, name, value // (divisor * count))
            elif is_width(name) and value % divisor == 0 and value // divisor >= least:
                setattr(config, name, value // divisor)
            elif "head_dim" in name and value // divisor < least < value:
                raise ValueError(f"{name} {value} is too narrow for {divisor}")
        elif isinstance(value, list) and is_width(name) and all(isinstance(one, int) for one in value):
            setattr(config, name, [one // divisor if one % divisor == 0 else one for one in value])
    for name in ("n_group", "topk_group", "num_expert_group", "num_limited_groups"):
        if isinstance(fields.get(name), int) and fields[name] > 1:
            setattr(config, name, 1)  # groups of experts that a router chooses among; few experts, one group
    for name, value in fields.items():
        if re.search(r"experts_per_tok|^top_?k$|topk$|top_k$|_experts_per_token$", name) and isinstance(value, int):
            setattr(config, name, min(value, EXPERTS // 2))
    for name in _CONFIG_IDS:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    _rope(config, divisor)


def is_width(name: str) -> bool:
    """Whether a field of this name counts channels."""
    return bool(_WIDTH.search(name)) and not _NOT_WIDTH.search(name)


def _shallow(config: Any, fields: dict[str, Any]) -> None:
    """A few layers: one period of whatever repeats, or two of each kind that a list of layers names."""
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth <= 2:
        return
    dense = next((fields[n] for n in fields if n.startswith("first_k_dense") and isinstance(fields[n], int)), 0)
    lists = {name: value for name, value in fields.items() if isinstance(value, (list, tuple)) and len(value) == depth}
    periods = [
        value
        for name, value in fields.items()
        if _PERIOD.search(name) and isinstance(value, int) and not isinstance(value, bool) and 1 < value <= DEEPEST
    ]
    if lists:
        rows = list(zip(*(map(repr, values) for values in lists.values()), strict=True))
        keep: list[int] = []
        for kind in dict.fromkeys(rows):
            keep += [index for index, row in enumerate(rows) if row == kind][:2]
        keep = sorted(keep)[:DEEPEST]
        if dense and not any(index >= dense for index in keep):
            keep = [*keep, *range(dense, min(depth, dense + 2))]
    elif periods:
        keep = list(range(min(depth, max(periods))))
    elif 0 < dense < depth:
        keep = [0, *range(dense, min(depth, dense + 2))]
    else:
        keep = [0, 1]
    config.num_hidden_layers = len(keep)
    for name, values in lists.items():
        setattr(config, name, type(values)(values[index] for index in keep))
    for name in fields:
        if name.startswith("first_k_dense") and dense:
            setattr(config, name, sum(index < dense for index in keep))


def _rope(config: Any, divisor: int) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    sections, changed = rope.get("mrope_section"), dict(rope)
    if isinstance(sections, list) and sections:
        half = max(len(sections), sum(sections) // divisor)
        rest = len(sections) - 1
        changed["mrope_section"] = [half - rest * (half // len(sections)), *[half // len(sections)] * rest]
    for name in ("short_factor", "long_factor"):  # one factor for each two channels that rotate
        if isinstance(rope.get(name), list) and len(rope[name]) >= divisor:
            changed[name] = rope[name][: len(rope[name]) // divisor]
    if changed != rope:
        config.rope_parameters = changed
