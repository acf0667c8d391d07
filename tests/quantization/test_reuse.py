"""A second run on what a first one found: the same bytes at the same settings, close to a search at others."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import awq_core
from awq_core.errors import CheckpointError, ConfigError
from awq_core.quantization.reuse import SCALES
from awq_core.testing import save_tiny

SAMPLES = [list(range(30 * i, 30 * i + 36)) for i in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, llama_config):
    folder = tmp_path_factory.mktemp("reuse") / "source"
    save_tiny(llama_config(intermediate_size=128), folder)
    return folder


@pytest.fixture(scope="module")
def first(source):
    out = source.parent / "first"
    config = awq_core.QuantConfig(group_size=32, rounding="nearest")
    awq_core.quantize(source, out, config=config, calibration=SAMPLES, samples=3, seq_len=32)
    return out


def reuse(source, first, out, **config):
    return awq_core.quantize(source, out, config=awq_core.QuantConfig(**{"rounding": "nearest", **config}), reuse=first)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_same_settings_give_the_same_bytes_without_calibration(source, first, tmp_path):
    result = reuse(source, first, tmp_path / "out", group_size=32)
    assert result.calibration is None
    assert weights(tmp_path / "out") == weights(first)
    assert (tmp_path / "out" / SCALES).read_bytes() == (first / SCALES).read_bytes()
    assert {report.family for report in result.reports if not report.name.endswith("o_proj")} == {"reused"}
    # and what was reused can be reused
    reuse(source, tmp_path / "out", tmp_path / "again", group_size=32)
    assert weights(tmp_path / "again") == weights(first)


def test_another_group_size_takes_the_scales_and_searches_the_ranges(source, first, tmp_path):
    config = awq_core.QuantConfig(group_size=64, rounding="nearest")
    with_scales = {"config": config, "calibration": SAMPLES, "samples": 3, "seq_len": 32}
    result = awq_core.quantize(source, tmp_path / "out", reuse=first, **with_scales)
    before, after = load_file(first / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(before[name], after[name])
    assert not torch.equal(after[name], load_file(source / "model.safetensors")[name])
    assert (
        after["model.layers.0.mlp.down_proj.scales"].shape[0]
        == before["model.layers.0.mlp.down_proj.scales"].shape[0] // 2
    )
    # On the first block, whose inputs nothing quantized can have changed, the reports are those of a full run.
    full = {r.name: r for r in awq_core.quantize(source, tmp_path / "full", **with_scales).reports}
    for report in result.reports:
        if report.name.startswith("model.layers.0."):
            assert report.loss > 0 and (report.family == "reused" or report.name.endswith("o_proj"))
            assert report.loss_rtn == pytest.approx(full[report.name].loss_rtn, rel=1e-4)


def test_another_group_size_without_clip_needs_no_calibration(source, first, tmp_path):
    result = reuse(source, first, tmp_path / "out", group_size=64, clip="none")
    assert result.calibration is None and {report.loss for report in result.reports} == {None}


def test_no_scale_and_no_clip_take_nothing(source, first, tmp_path):
    config = awq_core.QuantConfig(group_size=32, scale=False, clip="none")
    awq_core.quantize(source, tmp_path / "plain", config=config)
    reuse(source, first, tmp_path / "out", group_size=32, scale=False, clip="none")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


def test_a_folder_without_scales(source, tmp_path):
    with pytest.raises(ConfigError, match="nothing to reuse"):
        reuse(source, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model(first, tmp_path, llama_config):
    save_tiny(llama_config(intermediate_size=128), tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="made of another checkpoint"):
        reuse(tmp_path / "other", first, tmp_path / "out")


def test_a_run_that_searched_no_scales(source, tmp_path):
    config = awq_core.QuantConfig(group_size=32, scale=False)
    awq_core.quantize(source, tmp_path / "unscaled", config=config, calibration=SAMPLES, samples=3, seq_len=32)
    with pytest.raises(ConfigError, match="nothing to reuse"):
        reuse(source, tmp_path / "unscaled", tmp_path / "out")


def test_a_missing_scale_is_named(source, first, tmp_path):
    import shutil

    shutil.copytree(first, tmp_path / "damaged")
    scales = load_file(first / SCALES)
    name = sorted(scales)[0]
    fingerprint = _metadata(first / SCALES)
    del scales[name]
    save_file(scales, tmp_path / "damaged" / SCALES, fingerprint)
    with pytest.raises(ConfigError, match=name):
        reuse(source, tmp_path / "damaged", tmp_path / "out", group_size=32)


def test_damaged_scales_are_one_line(source, first, tmp_path):
    import shutil

    shutil.copytree(first, tmp_path / "damaged")
    (tmp_path / "damaged" / SCALES).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        reuse(source, tmp_path / "damaged", tmp_path / "out", group_size=32)


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()
