"""The quantization_config of every toolkit: what it says, and one line for everything that is not read."""

import json

import pytest

from awq_core.checkpoint.format import Settings
from awq_core.checkpoint.toolkits import read_settings
from awq_core.errors import CheckpointError

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "data_type": "int",
    "packing_format": "auto_round:auto_awq",
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}


def compressed(weights=None, scheme=None, **changes):
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "input_activations": None} | (scheme or {})
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return section | {"ignore": ["lm_head"]} | changes


@pytest.fixture
def settings(tmp_path):
    """settings(section): what config.json with this quantization_config says."""
    return lambda section: read_settings(tmp_path, {"model_type": "any", "quantization_config": section})


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (AWQ, Settings(group_size=32)),
        (AWQ | {"version": "GEMM", "modules_to_not_convert": None}, Settings(group_size=32)),
        (AWQ | {"zero_point": False}, Settings(group_size=32, zero_point=False)),
        (
            AWQ | {"dynamic": {"-:.*gate": {}, r"+:.*\.0\..*": {"group_size": 64}, "m": {"bits": 16}}},
            Settings(group_size=32, other_group_sizes=(64,)),
        ),
        (GPTQ, Settings(group_size=32, zero_point=False, version="gptq")),
        (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, Settings(group_size=32, version="gptq_v2")),
        (GPTQ | {"format": "gptq_v2", "group_size": -1, "sym": False}, Settings(group_size=-1, version="gptq_v2")),
        (AUTO_ROUND, Settings(group_size=32)),
        (AUTO_ROUND | {"packing_format": "auto_round", "act_bits": 16}, Settings(group_size=32, version="gptq_v2")),
        (
            {k: v for k, v in AUTO_ROUND.items() if k not in ("packing_format", "sym")},
            Settings(group_size=32, version="gptq", zero_point=False),
        ),
        (
            AUTO_ROUND | {"sym": True, "extra_config": {"a": {"bits": 16}, "b": {"group_size": -1, "sym": False}}},
            Settings(group_size=32, other_group_sizes=(-1,)),
        ),
        (compressed(), Settings(group_size=32, modules_to_not_convert=("lm_head",), version="pack-quantized")),
        (
            compressed({"strategy": "channel", "group_size": None}, ignore=None, sparsity_config={"format": "dense"}),
            Settings(group_size=-1, version="pack-quantized"),
        ),
        (
            compressed({"strategy": None, "symmetric": True}, {"format": "pack-quantized"}, format="mixed-precision"),
            Settings(group_size=32, modules_to_not_convert=("lm_head",), version="pack-quantized", zero_point=False),
        ),
        (
            compressed(config_groups={"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"group_size": 128}}}),
            Settings(
                group_size=32,
                modules_to_not_convert=("lm_head",),
                version="pack-quantized",
                other_group_sizes=(128,),
            ),
        ),
        (
            compressed(
                config_groups={
                    "a": {"weights": WEIGHTS | {"num_bits": 8, "group_size": 64}},
                    "b": {"weights": WEIGHTS},
                    "c": {"weights": WEIGHTS | {"num_bits": 8, "strategy": "channel", "symmetric": True}},
                }
            ),
            Settings(
                group_size=32,
                modules_to_not_convert=("lm_head",),
                version="pack-quantized",
                eight_bit=((64, True), (-1, False)),
            ),
        ),
    ],
)
def test_what_they_say(settings, section, expected):
    assert settings(section) == expected
    assert settings(json.loads(json.dumps(section))) == expected


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (AWQ | {"version": "gemv"}, ("AWQ layout 'gemv'", "only 'gemm'")),
        (AWQ | {"version": "gemv_fast"}, ("'gemv_fast'",)),
        (AWQ | {"version": "GEMV"}, ("'gemv'",)),
        (AWQ | {"dynamic": {"+:x": {"bits": 8}}}, ("dynamic.+:x says bits=8",)),
        (AWQ | {"dynamic": ["x"]}, ("dynamic is no table",)),
        (AWQ | {"dynamic": {"x": 3}}, ("dynamic.x is no table",)),
        (AWQ | {"dynamic": {"x": {"group_size": "32"}}}, ("group_size='32'",)),
        (GPTQ | {"bits": 8}, ("bits=8",)),
        (GPTQ | {"bits": "4"}, ("bits='4'",)),
        (GPTQ | {"bits": 4.0}, ("bits=4.0",)),
        (GPTQ | {"group_size": None}, ("group_size=None",)),
        (GPTQ | {"checkpoint_format": "marlin"}, ("GPTQ layout 'marlin'",)),
        (GPTQ | {"checkpoint_format": ["gptq"]}, ("GPTQ layout ['gptq']",)),
        (GPTQ | {"is_marlin_format": True}, ("GPTQ layout 'marlin'",)),
        (AUTO_ROUND | {"bits": 2}, ("bits=2",)),
        (AUTO_ROUND | {"data_type": "mx_fp"}, ("data_type='mx_fp'",)),
        (AUTO_ROUND | {"act_bits": 8}, ("act_bits=8",)),
        (AUTO_ROUND | {"packing_format": "mlx"}, ("auto-round layout 'mlx'",)),
        (AUTO_ROUND | {"packing_format": {}, "backend": 7}, ("auto-round layout 7",)),
        (AUTO_ROUND | {"rotation_config": {"hadamard": 1}}, ("rotation_config",)),
        (AUTO_ROUND | {"extra_config": {"a": {"bits": 8}}}, ("extra_config.a says bits=8",)),
        (AUTO_ROUND | {"extra_config": {"a": {"data_type": "fp"}}}, ("extra_config.a says data_type='fp'",)),
        (compressed({"num_bits": 8}), ("config_groups.group_0.weights says num_bits=8",)),
        (
            compressed(config_groups={"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"num_bits": 3}}}),
            ("config_groups.b.weights says num_bits=3",),
        ),
        (
            compressed(config_groups={"a": {"weights": WEIGHTS}, "b": {"weights": {"num_bits": 8, "type": "float"}}}),
            ("config_groups.b.weights", "'float'"),
        ),
        (compressed({"type": "float"}), ("type='float'",)),
        (compressed({"strategy": "tensor"}), ("strategy 'tensor'",)),
        (compressed({"group_size": 0}), ("group_size=0",)),
        (compressed(format="float-quantized"), ("compressed-tensors format 'float-quantized'",)),
        (compressed(format=None), ("format None",)),
        (compressed(scheme={"format": "nvfp4-pack-quantized"}), ("'nvfp4-pack-quantized'",)),
        (compressed(scheme={"input_activations": {"num_bits": 8}}), ("input_activations",)),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config",)),
        (compressed(transform_config={"config_groups": {"R1": {}}}), ("transform_config",)),
        (compressed(kv_cache_scheme={"num_bits": 8}), ("kv_cache_scheme",)),
        (compressed(config_groups=None), ("config_groups is no table",)),
        (compressed(config_groups={}), ("config_groups names no scheme",)),
        (compressed(config_groups={"W4A16": ["Linear"]}), ("config_groups.W4A16 is no table",)),
        (compressed(scheme={"weights": None}), ("config_groups.group_0.weights is no table",)),
        (compressed(ignore="lm_head"), ("ignore",)),
        (compressed(ignore=[1]), ("ignore",)),
        (compressed(ignore=3), ("ignore",)),
        (
            compressed(config_groups={"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"symmetric": True}}}),
            ("some config_groups are symmetric",),
        ),
        ({"quant_method": "fp8"}, ("quantized with fp8", "compressed-tensors")),
        ({"quant_method": ["awq"]}, ("quantized with ['awq']",)),
        ({"bits": 3}, ("an unnamed method",)),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(settings, section, words, one_line):
    with pytest.raises(CheckpointError) as caught:
        settings(section)
    one_line(caught.value, *words)
    assert caught.value.hint or "no list" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            Settings(group_size=128),
        ),
        (
            "quantize_config.json",
            {"bits": 4, "group_size": 128, "sym": False, "desc_act": False, "model_file_base_name": "model"},
            Settings(group_size=128, version="gptq"),
        ),
        ("quantize_config.json", AWQ, Settings(group_size=32)),
    ],
)
def test_older_releases_kept_it_in_a_file_of_its_own(tmp_path, name, content, expected):
    (tmp_path / name).write_text(json.dumps(content))
    assert read_settings(tmp_path, {"model_type": "any"}) == expected
    written = {"quantization_config": AWQ | {"group_size": 64}}
    assert read_settings(tmp_path, written) == Settings(group_size=64), "config.json comes first"


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", "[" * 100_000])
def test_a_damaged_file_beside_is_named(tmp_path, content, one_line):
    (tmp_path / "quant_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        read_settings(tmp_path, {})
    one_line(caught.value, "quant_config.json")


def test_an_ordinary_folder_has_none(tmp_path):
    assert read_settings(tmp_path, {"model_type": "any"}) is None
    assert read_settings(tmp_path, {"quantization_config": {}}) is None
