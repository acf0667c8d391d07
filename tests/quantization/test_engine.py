"""The engine end to end: what it reports and writes, against computations that know nothing of Gram matrices."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from awq_core import api
from awq_core.calibration.batches import CalibrationData
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.config import QuantConfig
from awq_core.errors import PlanError
from awq_core.quantization import scales
from awq_core.quantization.rounding import round_trip
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER
from awq_core.testing.tiny import save_tiny

TINY = {**TINY_DECODER, "num_hidden_layers": 3, "num_key_value_heads": 4}
PLAIN = QuantConfig(group_size=32)
NEAREST = QuantConfig(group_size=32, scale=False, clip="none")


@pytest.fixture
def ids(generator):
    return torch.randint(1, 127, (6, 40), generator=generator)


def calibration(*batches):
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return CalibrationData(tuple(batches), "test", len(batches), tokens)


def quantize(tmp_path, config, ids, settings=PLAIN, dtype=torch.float32, **options):
    source, out = tmp_path / "source", tmp_path / "out"
    model = save_tiny(config, source, dtype=dtype)
    data = calibration({"input_ids": ids})
    return model, api.quantize(source, out, config=settings, calibration=data, **options), out


def inputs_of(model, path, ids):
    """What module `path` reads when `model` runs on `ids`: `[tokens, in]`."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0].flatten(0, -2).float()


@pytest.fixture
def found_scales(monkeypatch):
    """Scales in the order they are found: per block q/k/v, o, gate/up, down."""
    found = []
    search = scales.search_all

    def spy(*args, **options):
        results = search(*args, **options)
        found.extend(results)
        return results

    monkeypatch.setattr(scales, "search_all", spy)
    return found


def test_reported_losses_are_those_of_a_token_by_token_computation(tmp_path, ids, found_scales):
    """Blocks 0 and 1: each linear on the tokens it saw in calibration, before and after, one token at a time."""
    model, result, out = quantize(tmp_path, LlamaConfig(**TINY), ids, QuantConfig(group_size=32, correct_inputs=0))
    done = load(out, fake_quant=True)
    reports = {report.name: report for report in result.reports}
    hybrid = copy.deepcopy(model)  # what block 1 was calibrated on: block 0 finished, the rest untouched
    ones = torch.ones(96)
    for layer in (0, 1):
        block = f"model.layers.{layer}"
        v_to_o, up_to_down = found_scales[4 * layer + 1].scale, found_scales[4 * layer + 3].scale
        for name, norm, columns, rows in (
            ("self_attn.q_proj", "input_layernorm", None, ones[:64]),
            ("self_attn.k_proj", "input_layernorm", None, ones[:64]),
            ("self_attn.v_proj", "input_layernorm", None, v_to_o),
            ("self_attn.o_proj", None, v_to_o, ones[:64]),
            ("mlp.gate_proj", "post_attention_layernorm", None, ones),
            ("mlp.up_proj", "post_attention_layernorm", None, up_to_down),
            ("mlp.down_proj", None, up_to_down, ones[:64]),
        ):
            before = x = inputs_of(hybrid, f"{block}.{name}", ids)
            if norm:
                with torch.no_grad():
                    before = done.get_submodule(f"{block}.{norm}")(inputs_of(hybrid, f"{block}.{norm}", ids))
            else:
                before = x / columns
            weight = hybrid.get_submodule(f"{block}.{name}").weight
            written = done.get_submodule(f"{block}.{name}").weight
            nearest = round_trip(weight, 32, torch.float16)
            loss = torch.stack([((written @ b) * rows - weight @ t).square() for b, t in zip(before, x, strict=True)])
            loss_rtn = torch.stack([((nearest - weight) @ t).square() for t in x])
            assert reports[f"{block}.{name}"].loss == pytest.approx(float(loss.detach().mean()), rel=1e-3), name
            assert reports[f"{block}.{name}"].loss_rtn == pytest.approx(float(loss_rtn.detach().mean()), rel=1e-3), name
        hybrid.model.layers[layer] = done.model.layers[layer]


def test_nearest_without_calibration_is_plain_rounding(tmp_path, ids):
    model, result, out = quantize(tmp_path, LlamaConfig(**TINY), ids, NEAREST)
    done = load(out, fake_quant=True)
    for name, parameter in model.named_parameters():
        written = done.get_parameter(name)
        linear = any(report.name + ".weight" == name for report in result.reports)
        expected = round_trip(parameter, 32, torch.float16) if linear else parameter
        torch.testing.assert_close(written, expected, rtol=0, atol=1e-6)
    assert result.calibration is None and result.reports[0].loss is None


def test_every_group_size_and_per_channel(tmp_path, ids):
    config = LlamaConfig(**{**TINY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1})
    for size in (32, 64, 128, -1):
        _, result, out = quantize(tmp_path / str(size), config, ids, QuantConfig(group_size=size))
        assert all(report.loss <= report.loss_rtn * 1.2 for report in result.reports)
        with CheckpointReader(out) as reader:
            groups = reader.shape("model.layers.0.mlp.down_proj.scales")[0]
        assert groups == (1 if size == -1 else 256 // size)
        assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == size


def test_same_seed_same_bytes(tmp_path, ids):
    folders = [quantize(tmp_path / name, LlamaConfig(**TINY), ids)[2] for name in ("a", "b")]
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    )
    assert first == second


def test_batches_and_padding_do_not_change_the_result(tmp_path, ids):
    """The same tokens in one batch, or one by one with left padding under a mask."""
    config = LlamaConfig(**TINY)
    source = tmp_path / "source"
    save_tiny(config, source)
    padded = []
    for row in ids:
        mask = torch.cat([torch.zeros(5, dtype=torch.long), torch.ones(40, dtype=torch.long)])[None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        row = torch.cat([torch.zeros(5, dtype=torch.long), row])[None]
        padded.append({"input_ids": row, "attention_mask": mask, "position_ids": positions})
    whole = api.quantize(source, tmp_path / "a", config=PLAIN, calibration=calibration({"input_ids": ids}))
    single = api.quantize(source, tmp_path / "b", config=PLAIN, calibration=calibration(*padded))
    for a, b in zip(whole.reports, single.reports, strict=True):
        assert a.tokens == b.tokens == ids.numel()
        # Ranges nearly tie; one that falls the other way in the first block changes the inputs of those behind it.
        assert a.loss_rtn == pytest.approx(b.loss_rtn, rel=1e-4 if ".layers.0." in a.name else 5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes(tmp_path, ids, dtype):
    model, result, out = quantize(tmp_path, LlamaConfig(**TINY), ids, dtype=dtype)
    scale_dtype = dtype if dtype is torch.bfloat16 else torch.float16
    with CheckpointReader(out) as reader:
        assert reader.dtype("model.layers.0.mlp.up_proj.scales") is scale_dtype
        assert reader.dtype("model.layers.0.input_layernorm.weight") is dtype
    assert sum(r.loss for r in result.reports) < sum(r.loss_rtn for r in result.reports)
    with torch.no_grad():
        got = load(out, fake_quant=True, dtype=torch.float32)(input_ids=ids).logits
        want = model.float()(input_ids=ids).logits
    assert float((got - want).norm() / want.norm()) < 0.3


def mixture(**options):
    return MixtralConfig(
        **{**TINY, "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 1, **options}
    )


def test_an_expert_that_no_token_reaches_is_calibrated_on_all(tmp_path, ids, generator):
    source = tmp_path / "source"
    model = save_tiny(mixture(), source)
    router = model.get_parameter("model.layers.0.mlp.gate.weight")
    router.data[2:] = 0
    router.data[0] = 5 * router.data[0].abs().mean() * torch.randn(64, generator=generator)
    router.data[1] = -router.data[0]  # one of the first two always wins: experts 2 and 3 starve
    model.save_pretrained(source)
    result = api.quantize(source, tmp_path / "out", config=PLAIN, calibration=calibration({"input_ids": ids}))
    experts = [report for report in result.reports if ".experts." in report.name]
    assert len(experts) == 12 and all(report.tokens == ids.numel() for report in experts)
    assert all(report.loss <= report.loss_rtn * 1.05 for report in experts)
    assert torch.isfinite(load(tmp_path / "out")(input_ids=ids).logits).all()


def test_mixture_keeps_its_routing(tmp_path, ids):
    """The router is multiplied by the scales of its norm, so its logits are the original's to rounding of the rest."""
    model, _, out = quantize(tmp_path, mixture(num_experts_per_tok=2), ids)
    done = load(out, fake_quant=True)
    norm_in = inputs_of(model, "model.layers.0.post_attention_layernorm", ids)
    logits = []
    for one in (model, done):
        block = one.get_submodule("model.layers.0")
        with torch.no_grad():
            logits.append(block.post_attention_layernorm(norm_in) @ block.mlp.gate.weight.T)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_names_on_disk_are_the_original_ones(tmp_path, ids):
    config = Qwen3MoeConfig(
        **{**TINY, "num_hidden_layers": 1}, head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32
    )
    _, _, out = quantize(tmp_path, config, ids)
    with CheckpointReader(out) as reader:
        assert "model.layers.0.mlp.experts.2.down_proj.qweight" in reader.names
        assert "model.layers.0.mlp.gate.weight" in reader.names


def test_tensors_the_model_does_not_know_are_carried_over(tmp_path, ids):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    save_tiny(LlamaConfig(**TINY), source)
    tensors = load_file(source / "model.safetensors")
    extra = {"mtp.head.weight": torch.randn(3, 3), "step": torch.tensor([7])}
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    api.quantize(source, tmp_path / "out", config=PLAIN, calibration=calibration({"input_ids": ids}))
    with CheckpointReader(tmp_path / "out") as reader:
        assert all(torch.equal(reader.tensor(name), value) for name, value in extra.items())


def test_windows_are_no_longer_than_the_models_context(tmp_path):
    source = tmp_path / "source"
    save_tiny(LlamaConfig(**TINY, max_position_embeddings=24), source)
    said = []
    result = api.quantize(
        source, tmp_path / "out", config=PLAIN, calibration=["some words " * 50], samples=2, progress=said.append
    )
    assert result.calibration.tokens == 48
    assert any("24 tokens, the model's context" in getattr(event, "text", "") for event in said)


def test_a_weight_read_without_a_call_is_named_with_its_remedy(tmp_path, ids, monkeypatch):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def peeks(self, *args, **kwargs):
        torch.zeros(64) + self.norm.weight  # read before the blocks, never called before them
        return forward(self, *args, **kwargs)

    source = tmp_path / "source"
    save_tiny(LlamaConfig(**TINY), source)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", peeks)
    with pytest.raises(PlanError, match=r"does not call.*LayerStack\.prelude"):
        api.quantize(source, tmp_path / "out", config=PLAIN, calibration=calibration({"input_ids": ids}))


def test_inputs_sent_to_the_device_of_a_weight_not_read_yet_are_refused(tmp_path, ids, monkeypatch):
    """`embed(ids.to(embed.weight.device))` gives no error by itself, but whatever the memory holds."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def sends(self, input_ids=None, **kwargs):
        return forward(self, input_ids=input_ids.to(self.embed_tokens.weight.device), **kwargs)

    source = tmp_path / "source"
    save_tiny(LlamaConfig(**TINY), source)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", sends)
    with pytest.raises(PlanError, match=r"calls model\.embed_tokens.*LayerStack\.prelude"):
        api.quantize(source, tmp_path / "out", config=PLAIN, calibration=calibration({"input_ids": ids}))
