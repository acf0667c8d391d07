"""Scripts written for AutoAWQ, with their argument names, from the first line to the last."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from awq_core import AutoAWQForCausalLM
from awq_core.errors import AwqError, CalibrationError, CheckpointError, ConfigError, OutputError
from awq_core.runtime.linear import QuantLinear

QUANT_CONFIG = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
SMALL = {"max_calib_samples": 4, "max_calib_seq_len": 32}


@pytest.fixture
def no_gpu(monkeypatch):
    """These scripts name no device, and must be the same everywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama_source, corpus):
    """The script of AutoAWQ's README: quantize, save, and the folder it makes."""
    quant_path = tmp_path_factory.mktemp("compat") / "llama-awq"
    model = AutoAWQForCausalLM.from_pretrained(
        str(llama_source), low_cpu_mem_usage=True, use_cache=False, safetensors=True, device_map="cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(llama_source, trust_remote_code=True)
    model.quantize(
        tokenizer,
        quant_config=QUANT_CONFIG,
        calib_data=corpus,
        n_parallel_calib_samples=2,
        duo_scaling=True,
        apply_clip=True,
        **SMALL,
    )
    model.save_quantized(str(quant_path), safetensors=True, shard_size="4GB")
    tokenizer.save_pretrained(str(quant_path))
    return quant_path


def test_the_script_from_end_to_end(saved, no_gpu):
    settings = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    model = AutoAWQForCausalLM.from_quantized(str(saved), fuse_layers=True, device_map="cpu", max_seq_len=512)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokens = tokenizer("def add(a, b):", return_tensors="pt").input_ids
    output = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape == (1, tokens.shape[1] + 4) and torch.equal(output[:, :-4], tokens)
    assert isinstance(tokenizer.decode(output[0]), str)


def test_the_model_inside_answers(saved, no_gpu):
    model = AutoAWQForCausalLM.from_quantized(saved, device_map="balanced", use_ipex=False, torch_dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in model.model.modules()) == 14
    assert model.config.model_type == "llama"  # attributes go to the model
    ids = torch.arange(8, 16)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model.model(input_ids=ids).logits)
    assert not model.generate(ids, max_new_tokens=1, pad_token_id=0).requires_grad
    with pytest.raises(AttributeError):
        model.no_such_attribute  # noqa: B018


@pytest.mark.parametrize(
    ("gpus", "device_map", "want"),
    [
        (0, None, "cpu"),
        (0, "auto", "cpu"),
        (1, None, "cuda"),
        (1, "auto", "cuda"),
        (2, "auto", "auto"),
        (2, None, "cuda"),
        (2, {"": 1}, {"": 1}),
        (2, "cuda:1", "cuda:1"),
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_what_load_is_asked(monkeypatch, gpus, device_map, want, fuse):
    asked = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr("awq_core.compat.load", lambda path, **options: asked.update(options))
    AutoAWQForCausalLM.from_quantized("DIR", device_map=device_map, fuse_layers=fuse)
    assert asked["device_map"] == want and asked["fuse"] is fuse and "device" not in asked


def test_a_group_size_that_divides_nothing_is_refused(llama_source, corpus):
    """AutoAWQ's default of 128 does not divide a width of 64: nothing would be 4-bit."""
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    with pytest.raises(ConfigError, match="nothing would be quantized"):
        model.quantize(quant_config={**QUANT_CONFIG, "q_group_size": 128}, calib_data=corpus, **SMALL)


def test_modules_to_not_convert_is_passed_on(tmp_path, llama_source, corpus):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    model.quantize(
        quant_config={**QUANT_CONFIG, "modules_to_not_convert": ["mlp"]}, calib_data=corpus, apply_clip=False, **SMALL
    )
    assert model.result.plan.config.clip == "none"
    model.save_quantized(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.0.self_attn.q_proj.qweight" in names


@pytest.mark.parametrize("kind", ["file", "rows", "tokens"])
def test_calibration_data_of_every_kind(tmp_path, llama_source, corpus, kind):
    if kind == "file":
        data = str(tmp_path / "corpus.txt")
        (tmp_path / "corpus.txt").write_text("\n".join(corpus))
        options = {}
    elif kind == "rows":
        data = str(tmp_path / "corpus.jsonl")
        (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"body": text, "text": ""}) for text in corpus))
        options = {"text_column": "body", "split": "train"}
    else:
        data = torch.randint(8, 100, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
        options = {}
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    result = model.quantize(quant_config=QUANT_CONFIG, calib_data=data, **options, **SMALL)
    assert result.calibration.samples == 4 and result.calibration.tokens == 4 * 32


# -- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_point": False}, "zero_point=False"),
        ({"version": "GEMV"}, "version='GEMV'"),
        ({"version": "marlin"}, "version='marlin'"),
        ({"w_bit": 3}, "bits=3"),
        ({"q_group_size": 48}, "group_size=48"),
        ({"q_groupsize": 32}, "did you mean 'q_group_size'?"),
    ],
)
def test_settings_the_format_cannot_hold(llama_source, changes, words, one_line):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    with pytest.raises(ConfigError) as caught:
        model.quantize(quant_config={**QUANT_CONFIG, **changes}, calib_data=["text"])
    one_line(caught.value, words)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError):
        model.save_quantized("never-written")


def test_version_in_any_case(llama_source, corpus):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    assert model.quantize(quant_config={**QUANT_CONFIG, "version": "gemm"}, calib_data=corpus, **SMALL).reports


def test_unknown_arguments_are_refused_by_name(llama_source, saved, one_line):
    calls = {
        "from_pretrained": lambda: AutoAWQForCausalLM.from_pretrained(llama_source, devicemap="cpu"),
        "quantize": lambda: AutoAWQForCausalLM.from_pretrained(llama_source).quantize(calib_dta=["text"]),
        "from_quantized": lambda: AutoAWQForCausalLM.from_quantized(saved, fuse_layer=True),
    }
    for call, run in calls.items():
        with pytest.raises(ConfigError) as caught:
            run()
        one_line(caught.value, call, "unknown argument")
        assert caught.value.exit_code == 2


def test_save_before_quantize(tmp_path, llama_source, one_line):
    with pytest.raises(ConfigError) as caught:
        AutoAWQForCausalLM.from_pretrained(llama_source).save_quantized(tmp_path / "out")
    one_line(caught.value, "nothing to save", "call quantize first")
    assert not (tmp_path / "out").exists()


def test_generate_before_loading(llama_source, one_line):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    for run in (model.generate, model):
        with pytest.raises(ConfigError) as caught:
            run(torch.ones(1, 1))
        one_line(caught.value, "nothing is loaded", "from_quantized")


def test_quantizing_a_quantized_model(saved, no_gpu, one_line):
    with pytest.raises(ConfigError) as caught:
        AutoAWQForCausalLM.from_quantized(saved).quantize(calib_data=["text"])
    one_line(caught.value, "quantized already", "from_pretrained")
    with pytest.raises(CheckpointError) as caught:
        AutoAWQForCausalLM.from_pretrained(saved).quantize(quant_config=QUANT_CONFIG, calib_data=["text"])
    one_line(caught.value, "already quantized")


def test_a_folder_that_holds_a_model_is_not_overwritten(saved, llama_source, corpus, tmp_path, one_line):
    target = shutil.copytree(saved, tmp_path / "taken")
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    model.quantize(quant_config=QUANT_CONFIG, calib_data=corpus, **SMALL)
    with pytest.raises(OutputError) as caught:
        model.save_quantized(target)
    one_line(caught.value, target, "already holds a model")
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before


def test_pickle_is_refused(tmp_path, llama_source, corpus, one_line):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    model.quantize(quant_config=QUANT_CONFIG, calib_data=corpus, **SMALL)
    with pytest.raises(ConfigError) as caught:
        model.save_quantized(tmp_path / "out", safetensors=False)
    one_line(caught.value, "pickle", "safetensors=True")


def test_a_full_disk_while_saving(tmp_path, llama_source, corpus, monkeypatch, one_line):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    model.quantize(quant_config=QUANT_CONFIG, calib_data=corpus, **SMALL)

    copy, files = shutil.copy2, sum(path.is_file() for path in model.result.out.rglob("*"))
    for room in range(files):

        def full(source, target, out=tmp_path / f"out-{room}", room=room):
            if sum(path.is_file() for path in out.rglob("*")) == room:
                raise OSError(errno.ENOSPC, "No space left on device")
            copy(source, target)

        monkeypatch.setattr(shutil, "copy2", full)
        with pytest.raises(OutputError) as caught:
            model.save_quantized(tmp_path / f"out-{room}")
        one_line(caught.value, "disk full", tmp_path / f"out-{room}")
        assert not (tmp_path / f"out-{room}" / "config.json").exists(), "config.json comes last"


@pytest.mark.parametrize(
    ("data", "words"), [([], "no text"), (["", "  "], "no text"), (["short"], "one sample needs 32")]
)
def test_calibration_data_that_is_no_use(llama_source, data, words, one_line):
    model = AutoAWQForCausalLM.from_pretrained(llama_source)
    with pytest.raises(CalibrationError) as caught:
        model.quantize(quant_config=QUANT_CONFIG, calib_data=data, **SMALL)
    one_line(caught.value, words)


def test_a_device_that_is_not_there(saved, no_gpu, one_line):
    with pytest.raises(AwqError) as caught:
        AutoAWQForCausalLM.from_quantized(saved, device_map="cuda:0")
    one_line(caught.value, "cuda:0", "no GPU")
