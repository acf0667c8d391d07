"""`--infer`, and `awq plugins new`: only for a model nobody claims, only if proved, exit code 3 otherwise."""

import json

import pytest


def test_plan_of_a_model_that_nobody_claims(awq, plugins, llama_source):
    plugins()
    result = awq("plan", llama_source, code=3)
    assert "no installed plugin claims" in result.errors[-1]
    shown = awq("plan", llama_source, "--infer", "--group-size", "32")
    assert "by plugin inferred (awq-core" in shown.stdout
    assert "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj" in shown.stdout
    assert any("8 scale groups proved" in line for line in shown.errors)


def test_a_claimed_model_is_not_inferred(awq, llama_source):
    shown = awq("plan", llama_source, "--infer", "--group-size", "32")
    assert "by plugin tiny" in shown.stdout
    assert "a plugin claims the model: nothing is inferred" in shown.errors


def test_quantize_prints_the_plan_first_and_the_recipe_repeats_it(awq, plugins, llama_source, corpus_file, tmp_path):
    plugins()
    out, again = tmp_path / "out", tmp_path / "again"
    options = ["--group-size", "32", "--samples", "2", "--seq-len", "32", "--calib", corpus_file]
    result = awq("quantize", llama_source, "--out", out, "--infer", *options)
    told = "\n".join(result.errors)
    assert told.index("scale groups proved") < told.index("mlp.up_proj -> mlp.down_proj") < told.index("block 1/2")
    recipe = (out / "recipe.yaml").read_text()
    assert "\ninfer: true\n" in recipe and "plugin:" not in recipe
    awq("quantize", llama_source, "--recipe", out / "recipe.yaml", "--calib", corpus_file, "--out", again)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    awq("generate", out, "--prompt", "def", "--max-new-tokens", "2")


@pytest.mark.parametrize("command", [("plan",), ("quantize", "--out", "never")])
def test_what_cannot_be_inferred_ends_with_code_3(awq, plugins, tmp_path, monkeypatch, command):
    plugins()
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    name, *options = command
    result = awq(name, model, *options, "--infer", code=3)
    assert result.errors[-1].startswith("awq: error: ") and "vit" in result.errors[-1]
    assert not (tmp_path / "never").exists()


def test_a_new_plugin(awq, plugins, llama_source, tmp_path, read_json):
    plugins()
    out = tmp_path / "plugin"
    told = read_json(
        awq("plugins", "new", "acorn", "--from-model", llama_source / "config.json", "--out", out, "--json")
    )
    assert told["proved"] and told["model_type"] == "llama" and told["unscaled"] == []
    assert set(told["files"]) >= {"pyproject.toml", "awq_plugin_acorn/__init__.py", "tests/test_acorn.py"}
    assert "scale_groups=presets.LLAMA_BLOCK" in (out / "awq_plugin_acorn" / "__init__.py").read_text()
    error = awq("plugins", "new", "acorn", "--from-model", llama_source, "--out", out, code=1)
    assert "already there" in error.errors[-1]
    error = awq("plugins", "new", "Acorn Nut", "--from-model", llama_source, "--out", tmp_path / "x", code=2)
    assert "no family name" in error.errors[-1]
