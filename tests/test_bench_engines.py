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
