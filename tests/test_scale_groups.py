"""Declared groups against blocks built by hand: what the globs bind, what is skipped, what is refused."""

from dataclasses import replace

import pytest
from torch import nn

from awq_core.errors import PlanError
from awq_core.hooks import ScaleGroup
from awq_core.scale_groups import expand, resolve_groups
from awq_core.shared_heads import SharedHeads


def tree(modules: dict[str, nn.Module]) -> nn.Module:
    """A module tree from dotted paths."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, leaf = path.split(".")
        at = root
        for name in parents:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at._modules[name]
        at.add_module(leaf, module)
    return root


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, device="meta")


def mixture(experts: int) -> nn.Module:
    """A norm, a router and experts."""
    modules: dict[str, nn.Module] = {"norm": nn.LayerNorm(32), "moe.gate": linear(32, experts)}
    for index in range(experts):
        modules[f"moe.experts.{index}.up"] = linear(32, 48)
        modules[f"moe.experts.{index}.down"] = linear(48, 32)
    return tree(modules)


def attention(key_value: int = 32, norm: nn.Module | None = None) -> nn.Module:
    return tree(
        {
            "norm": norm or nn.LayerNorm(32),
            "attn.q": linear(32, 32),
            "attn.k": linear(32, key_value),
            "attn.v": linear(32, key_value),
            "attn.o": linear(32, 32),
        }
    )


QKV = ScaleGroup(prev="norm", layers=("attn.q", "attn.k", "attn.v"), no_clip=("attn.q", "attn.k"))
OUT = ScaleGroup(prev="attn.v", layers=("attn.o",))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.0.up", ["a.0.up"]),
        ("a.up", []),
        ("a*0.up", []),
        ("a.*.up", ["a.0.up", "a.11.up"]),
        ("*.*.up", ["a.0.up", "a.11.up"]),
        ("a.*", ["a.0", "a.11"]),
        ("a.1*.up", ["a.11.up"]),
        ("*", ["a", "azup"]),
        ("a.*.*.up", ["a.0.deep.up"]),
        ("azup", ["azup"]),
        ("a.1.up", []),
    ],
)
def test_a_star_is_one_segment(pattern, found):
    names = ["a", "a.0", "a.0.up", "a.0.deep.up", "a.11", "a.11.up", "azup"]
    assert expand(pattern, dict.fromkeys(names)) == found


def test_every_expert_has_a_group_of_its_own():
    block = mixture(12)
    groups, skipped = resolve_groups(
        block, [ScaleGroup(prev="moe.experts.*.up", layers=("moe.experts.*.down",))], where="layers.0"
    )
    assert not skipped
    assert {(group.prev, group.layers, group.observe) for group in groups} == {
        (f"moe.experts.{i}.up", (f"moe.experts.{i}.down",), f"moe.experts.{i}.down") for i in range(12)
    }


def test_all_experts_read_one_norm_and_the_router_is_compensated():
    (group,), _ = resolve_groups(
        mixture(3), [ScaleGroup(prev="norm", layers=("moe.experts.*.up",), compensate=("moe.gate",), norm_offset=1.0)]
    )
    assert group.layers == tuple(f"moe.experts.{i}.up" for i in range(3))
    assert group.compensate == ("moe.gate",)
    assert (group.prev, group.observe, group.norm_offset) == ("norm", "moe.experts.0.up", 1.0)


def test_stars_beyond_those_of_prev_stay_globs():
    modules: dict[str, nn.Module] = {}
    for part in range(2):
        modules[f"parts.{part}.up"] = linear(32, 48)
        for head in range(3):
            modules[f"parts.{part}.heads.{head}"] = linear(48, 8)
        modules[f"parts.{part}.router"] = linear(48, 2)
    groups, _ = resolve_groups(
        tree(modules),
        [ScaleGroup(prev="parts.*.up", layers=("parts.*.heads.*",), compensate=("parts.*.router",))],
    )
    assert [group.layers for group in groups] == [tuple(f"parts.{p}.heads.{h}" for h in range(3)) for p in range(2)]
    assert [group.compensate for group in groups] == [("parts.0.router",), ("parts.1.router",)]


def test_observe_is_bound_like_the_layers():
    group = ScaleGroup(prev="moe.experts.*.up", layers=("moe.experts.*.down",), observe="moe.experts.*")
    groups, _ = resolve_groups(mixture(2), [group])
    assert [group.observe for group in groups] == ["moe.experts.0", "moe.experts.1"]
    (group,), _ = resolve_groups(mixture(2), [ScaleGroup(prev="norm", layers=("moe.experts.*.up",), observe="moe")])
    assert group.observe == "moe"


def test_multi_head_attention_scales_its_output_projection():
    groups, skipped = resolve_groups(attention(), [QKV, OUT])
    assert [(group.prev, group.layers) for group in groups] == [("norm", QKV.layers), ("attn.v", ("attn.o",))]
    assert not skipped


@pytest.mark.parametrize(
    ("size", "path", "why"),
    [
        (4, "", "head_dim says how"),  # nothing declared
        (None, "attn.size", "attn.size is no size"),
        ("4", "attn.size", "attn.size is no size"),
        (0, "attn.size", "attn.size is no size"),
        (3, "attn.size", "heads of 3 channels"),
        (4, "attn.typo.size", "attn.typo.size is no size"),
    ],
)
def test_grouped_query_attention_without_a_head_size_is_skipped(size, path, why):
    block = attention(key_value=16)
    block.attn.size = size
    groups, (skip,) = resolve_groups(block, [QKV, replace(OUT, head_dim=path)])
    assert [group.prev for group in groups] == ["norm"]
    assert skip.where == "attn.v -> attn.o" and skip.layers == ("attn.o",)
    assert "16 channels" in skip.why and "takes 32" in skip.why and why in skip.why


@pytest.mark.parametrize(("key_value", "shared"), [(8, SharedHeads(4, 4)), (16, SharedHeads(2, 4)), (32, None)])
def test_grouped_query_attention_shares_scales(key_value, shared):
    block = attention(key_value=key_value)
    block.attn.size = 4
    groups, skipped = resolve_groups(block, [QKV, replace(OUT, head_dim="attn.size")])
    assert [group.shared for group in groups] == [None, shared] and not skipped


@pytest.mark.parametrize("key_value", [12, 20, 64])
def test_heads_that_do_not_divide_are_skipped(key_value):
    """12 and 20 of 32 inputs are no whole number of repeats; 64 is more than the reader takes."""
    block = attention(key_value=key_value)
    block.attn.size = 4
    groups, (skip,) = resolve_groups(block, [QKV, replace(OUT, head_dim="attn.size")])
    assert [group.prev for group in groups] == ["norm"]
    assert f"writes {key_value} channels, its reader takes 32" in skip.why


def test_a_norm_that_works_head_by_head_shares_its_scales():
    block = tree({"norm": nn.LayerNorm(4), "o": linear(32, 32)})
    block.size = 4
    (group,), skipped = resolve_groups(block, [ScaleGroup(prev="norm", layers=("o",), head_dim="size")])
    assert group.shared == SharedHeads(8, 4) and not skipped
    block.size = 3
    _, (skip,) = resolve_groups(block, [ScaleGroup(prev="norm", layers=("o",), head_dim="size")])
    assert "norm has 4 weights" in skip.why and "heads of 3" in skip.why
    with pytest.raises(PlanError, match=r"norm norm has shape \(4,\)"):
        resolve_groups(block, [ScaleGroup(prev="norm", layers=("o",))])


@pytest.mark.parametrize(("rows", "prev_rows", "folded"), [(96, "last", True), (96, "all", False), (16, "last", False)])
def test_fused_qkv_gives_its_last_rows(rows, prev_rows, folded):
    block = tree({"qkv": linear(32, rows), "o": linear(32, 32)})
    groups, skipped = resolve_groups(block, [ScaleGroup(prev="qkv", layers=("o",), prev_rows=prev_rows)])
    assert (len(groups), len(skipped)) == ((1, 0) if folded else (0, 1))


@pytest.mark.parametrize(
    ("rows", "prev_rows", "shared", "sections"),
    [
        (96, "last", None, 1),  # 8 query heads of 4, 8 key-value heads
        (48, "last", SharedHeads(4, 4), 1),  # 2 key-value heads
        (40, "last", SharedHeads(8, 4), 1),  # 1
        (96, "heads", None, 8),
        (48, "heads", SharedHeads(4, 4), 2),
        (40, "heads", SharedHeads(8, 4), 1),
        (96, "kv_heads", None, 8),  # keys of 8 channels, values of 4
        (64, "kv_heads", None, 8),  # of 4 and 4: not 8 query heads and 4 for keys and values
    ],
)
def test_fused_qkv_with_a_head_size_says_where_its_values_are(rows, prev_rows, shared, sections):
    block = tree({"qkv": linear(32, rows), "o": linear(32, 32)})
    block.size = 4
    group = ScaleGroup(prev="qkv", layers=("o",), prev_rows=prev_rows, head_dim="size")
    (found,), skipped = resolve_groups(block, [group])
    assert (found.shared, found.sections) == (shared, sections) and not skipped


@pytest.mark.parametrize(("rows", "head_dim"), [(96, ""), (33, "size"), (32, "size"), (128, "size"), (44, "size")])
def test_fused_qkv_that_does_not_fit_is_skipped(rows, head_dim):
    """No head size; an odd row; no values; more values than are read; 6 values in heads of 4."""
    block = tree({"qkv": linear(32, rows), "o": linear(32, 32)})
    block.size = 4
    group = ScaleGroup(prev="qkv", layers=("o",), prev_rows="heads", head_dim=head_dim)
    groups, (skip,) = resolve_groups(block, [group])
    assert not groups and f"writes {rows} channels, its reader takes 32" in skip.why


@pytest.mark.parametrize(("rows", "head_dim"), [(96, ""), (68, "size"), (24, "size"), (96, "three")])
def test_keys_and_values_that_do_not_fit_are_skipped(rows, head_dim):
    """No head size; no whole number of rows a head; fewer rows than are read; a head that does not divide the width."""
    block = tree({"kv": linear(32, rows), "o": linear(32, 32)})
    block.size, block.three = 4, 3
    groups, (skip,) = resolve_groups(
        block, [ScaleGroup(prev="kv", layers=("o",), prev_rows="kv_heads", head_dim=head_dim)]
    )
    assert not groups and f"writes {rows} channels, its reader takes 32" in skip.why


def test_a_norm_without_weight_holds_no_scale():
    block = attention(norm=nn.LayerNorm(32, elementwise_affine=False))
    groups, (skip,) = resolve_groups(block, [QKV])
    assert not groups
    assert skip.layers == QKV.layers and "no weight" in skip.why


def test_readers_of_a_residual_have_no_scales_and_one_fate():
    """Several such groups may stand in one block: they have no common `prev`."""
    residual = [replace(QKV, prev=""), ScaleGroup(prev="", layers=("attn.o",))]
    groups, skips = resolve_groups(attention(), residual)
    assert not groups
    assert [skip.layers for skip in skips] == [QKV.layers, ("attn.o",)]
    assert all("could be divided" in skip.why and skip.where.startswith("no scales ->") for skip in skips)
    with pytest.raises(PlanError, match=r"attn\.v is in two scale groups"):
        resolve_groups(attention(), [QKV, ScaleGroup(prev="", layers=("attn.v",))])


@pytest.mark.parametrize(
    "group",
    [
        ScaleGroup(prev="absent", layers=("attn.o",), optional=True),
        ScaleGroup(prev="norm", layers=("mlp.*.gate",), optional=True),
        ScaleGroup(prev="norm", layers=("attn.q",), compensate=("router",), optional=True),
    ],
)
def test_an_optional_group_may_be_absent(group):
    assert resolve_groups(attention(), [group]) == ((), ())


def test_optional_groups_that_are_there_are_resolved():
    groups, _ = resolve_groups(attention(), [ScaleGroup(prev="norm", layers=("attn.q",), optional=True)])
    assert [group.layers for group in groups] == [("attn.q",)]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (ScaleGroup(prev="absent", layers=("attn.o",)), "nothing matches 'absent'"),
        (ScaleGroup(prev="norm", layers=("attn.q", "attn.qq")), "nothing matches 'attn.qq'"),
        (ScaleGroup(prev="norm", layers=("mlp.*.up",)), "nothing matches 'mlp.*.up'"),
        (ScaleGroup(prev="norm", layers=("attn.q",), compensate=("router",)), "nothing matches 'router'"),
        (ScaleGroup(prev="norm", layers=("attn.q",), no_clip=("attn.qq",)), "nothing matches 'attn.qq'"),
        (ScaleGroup(prev="norm", layers=("attn.q",), observe="attn.x"), "nothing matches 'attn.x'"),
    ],
)
def test_a_path_that_matches_nothing_is_refused_with_what_there_is(group, words, one_line):
    with pytest.raises(PlanError) as caught:
        resolve_groups(attention(), [group], where="layers.7")
    one_line(caught.value, "layers.7", words, "attn.q, attn.k, attn.v, attn.o")


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([QKV, ScaleGroup(prev="attn.v", layers=("attn.q",))], "attn.q is in two scale groups: norm and attn.v"),
        ([QKV, ScaleGroup(prev="norm", layers=("attn.o",))], "output of norm is in two scale groups"),
        (
            [QKV, ScaleGroup(prev="attn.v", layers=("attn.o",), compensate=("attn.k",))],
            "attn.k is in two scale groups: norm and attn.v",
        ),
        ([ScaleGroup(prev="norm", layers=("attn",))], "attn is not a linear"),
    ],
)
def test_contradictions_are_refused(groups, words, one_line):
    with pytest.raises(PlanError) as caught:
        resolve_groups(attention(), groups, where="layers.7")
    one_line(caught.value, "layers.7", words)


@pytest.mark.parametrize(
    ("modules", "group", "words"),
    [
        (
            {"norm": nn.LayerNorm(32), "a": linear(32, 8), "b": linear(48, 8)},
            ScaleGroup(prev="norm", layers=("a", "b")),
            "unequal inputs [32, 48]",
        ),
        (
            {"norm": nn.LayerNorm(48), "a": linear(32, 8)},
            ScaleGroup(prev="norm", layers=("a",)),
            "norm norm has shape (48,), its readers take 32",
        ),
        (
            {"table": nn.Embedding(8, 32), "a": linear(32, 8)},
            ScaleGroup(prev="table", layers=("a",)),
            "norm table has shape (8, 32)",
        ),
        (
            {"norm": nn.LayerNorm(32), "a": linear(32, 8), "router": linear(48, 8)},
            ScaleGroup(prev="norm", layers=("a",), compensate=("router",)),
            "router is compensated, its weight (8, 48) does not take 32 inputs",
        ),
        (
            {"norm": nn.LayerNorm(32), "a": linear(32, 8), "act": nn.SiLU()},
            ScaleGroup(prev="norm", layers=("a",), compensate=("act",)),
            "act is compensated",
        ),
        (
            {"e.0.up": linear(32, 48), "e.0.down": linear(48, 32), "e.1.up": linear(32, 48)},
            ScaleGroup(prev="e.*.up", layers=("e.*.down",)),
            "for e.1.up nothing matches 'e.*.down'",
        ),
        (
            {"e.0.up": linear(32, 48), "e.0.down": linear(48, 32), "e.1.up": linear(32, 48), "e.1.gate": linear(32, 8)},
            ScaleGroup(prev="e.*.up", layers=("e.*.down",), observe="e.*.gate"),
            "for e.0.up nothing matches 'e.*.gate'",
        ),
    ],
)
def test_shapes_that_cannot_be_are_refused(modules, group, words, one_line):
    with pytest.raises(PlanError) as caught:
        resolve_groups(tree(modules), [group], where="layers.7")
    one_line(caught.value, "layers.7", words)


def test_every_plan_error_has_exit_code_4():
    with pytest.raises(PlanError) as caught:
        resolve_groups(attention(), [ScaleGroup(prev="absent", layers=("attn.o",))])
    assert caught.value.exit_code == 4 and caught.value.hint
