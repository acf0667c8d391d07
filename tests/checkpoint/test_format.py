"""The quantization_config of many tools, and the shapes that make a quantized linear."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from awq_core.checkpoint.format import (
    Settings,
    already_quantized,
    expected_tensors,
    quantization_config,
    read_quantization_config,
    validate_packed,
)
from awq_core.checkpoint.pack import PackedLinear, pack_linear
from awq_core.errors import CheckpointError

GEMM = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def test_what_is_written_is_what_engines_read() -> None:
    written = quantization_config(group_size=128, modules_to_not_convert=("lm_head",))
    assert json.loads(json.dumps(written)) == {**GEMM, "modules_to_not_convert": ["lm_head"]}
    settings = read_quantization_config({"model_type": "any", "quantization_config": written})
    assert settings == Settings(group_size=128, modules_to_not_convert=("lm_head",))
    assert (settings.bits, settings.zero_point, settings.version) == (4, True, "gemm")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {**GEMM, "modules_to_not_convert": None}},
        {"quantization_config": {**GEMM, "version": "GEMM"}},
        {"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "format": "gemm", "sym": True}},
        {"text_config": {"quantization_config": GEMM}, "vision_config": {}},
        {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},  # an old quant_config.json
    ],
)
def test_spellings_of_the_same_thing(config: dict[str, Any]) -> None:
    assert read_quantization_config(config) == Settings(group_size=128)
    assert already_quantized(config) == "awq"


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}, "vocab_size": 8}])
def test_an_ordinary_model_has_no_settings(config: dict[str, Any]) -> None:
    assert read_quantization_config(config) is None
    assert already_quantized(config) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "gemv"}, "'gemv'"),
        ({"version": "gemv_fast"}, "'gemv_fast'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"backend": "llm-awq"}, "'llm-awq'"),
        ({"quant_method": "gptq"}, "gptq, not awq"),
        ({"bits": 8}, "bits=8"),
        ({"bits": None}, "bits=None"),
        ({"zero_point": "no"}, "zero_point='no'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "128"}, "group_size='128'"),
        ({"group_size": None}, "group_size=None"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_quantization_config({"quantization_config": {**GEMM, **changes}})


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"bits": 3}}, "an unnamed method"),
    ],
)
def test_other_methods_are_named(config: dict[str, Any], method: str) -> None:
    assert already_quantized(config) == method
    with pytest.raises(CheckpointError, match=f"quantized with {method}"):
        read_quantization_config(config)


@pytest.mark.parametrize("group", [32, 64, -1])
def test_expected_tensors_are_what_packing_makes(group: int) -> None:
    size = 192 if group == -1 else group
    made = pack_linear(torch.zeros(24, 192), torch.ones(24, 192 // size), torch.zeros(24, 192 // size), torch.bfloat16)
    expected = expected_tensors("a.b", 192, 24, group, torch.bfloat16, bias=True)
    assert expected == {
        "a.b.qweight": (tuple(made.qweight.shape), made.qweight.dtype),
        "a.b.qzeros": (tuple(made.qzeros.shape), made.qzeros.dtype),
        "a.b.scales": (tuple(made.scales.shape), made.scales.dtype),
        "a.b.bias": ((24,), torch.bfloat16),
    }
    validate_packed("a.b", made, 192, 24, group)


@pytest.mark.parametrize(
    ("in_features", "out", "group", "words"), [(96, 8, 64, "does not divide"), (64, 12, 32, "12 ")]
)
def test_linears_the_format_cannot_hold(in_features: int, out: int, group: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"a.b: .*{words}"):
        expected_tensors("a.b", in_features, out, group)


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("qweight", meta((64, 5)), r"a\.b\.qweight has shape \(64, 5\), expected \(64, 4\)"),
        ("qweight", meta((8, 32)), "GPTQ layout"),
        ("qweight", meta((32, 8)), "gemv layout"),
        ("qweight", meta((64, 4), torch.int64), r"a\.b\.qweight is torch.int64"),
        ("qzeros", meta((1, 4)), r"a\.b\.qzeros has shape.*group_size"),
        ("qzeros", meta((2, 4), torch.float16), r"a\.b\.qzeros is torch.float16"),
        ("scales", meta((2, 4), torch.float16), r"a\.b\.scales has shape"),
        ("scales", meta((2, 32), torch.float32), r"a\.b\.scales is torch.float32"),
    ],
)
def test_a_wrong_tensor_is_named(part: str, tensor: torch.Tensor, words: str) -> None:
    right = {"qweight": meta((64, 4)), "qzeros": meta((2, 4)), "scales": meta((2, 32), torch.float16)}
    validate_packed("a.b", PackedLinear(**right), 64, 32, 32)
    with pytest.raises(CheckpointError, match=words):
        validate_packed("a.b", PackedLinear(**{**right, part: tensor}), 64, 32, 32)
