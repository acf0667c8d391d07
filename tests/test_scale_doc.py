"""docs/scale.md's arithmetic is `awq plan`'s, on configurations of those sizes, without weights."""

import re
from pathlib import Path

import pytest
from transformers import DeepseekV3Config, LlamaConfig

import awq_core

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
COMMON = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
LARGE = {**COMMON, "vocab_size": 128256, "num_key_value_heads": 8}
SHAPE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 1}
SHAPE_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
SHAPE_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126}
CONFIGS = {
    "70B": lambda: LlamaConfig(**LARGE, **SHAPE_70B),
    "405B": lambda: LlamaConfig(**LARGE, **SHAPE_405B),
    "671B": lambda: DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16"),
}


def scoring(plan):
    """What one scoring of all weights costs, but for a factor: the sum of out · in²."""
    return sum(linear.out_features * linear.in_features**2 for linear in plan.linears if linear.quantize)


def row(plan, minute):
    """Cells of the table: the estimates in GB, the copy at 1 Gbit/s, and the work in layers of 7B, a minute each."""
    gigabytes = [plan.bytes_before, plan.bytes_after, plan.bytes_before + plan.bytes_after, plan.peak_bytes]
    block = 2 * max(block.parameters for block in plan.blocks)
    hours = plan.bytes_before / 125e6 / 3600, scoring(plan) / minute / 60
    return [f"{size / 1e9:.1f}" for size in (*gigabytes, block)] + [f"{hours[0]:.1f}", f"{hours[1]:.0f}"]


@pytest.mark.parametrize("size", CONFIGS)
def test_the_table_is_the_plans(size, tmp_path):
    pytest.importorskip("awq_plugin_deepseek" if size == "671B" else "awq_plugin_llama")
    LlamaConfig(**COMMON, **SHAPE_7B).save_pretrained(tmp_path / "7b")
    CONFIGS[size]().save_pretrained(tmp_path / "large")
    minute = scoring(awq_core.plan(tmp_path / "7b"))
    found = row(awq_core.plan(tmp_path / "large"), minute)
    (line,) = re.findall(rf"^\| {size} \|(.+)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [cell.strip() for cell in line.split("|")] == found
