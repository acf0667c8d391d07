"""An architecture of a company's own, unknown to transformers and to this project, brought whole by its plugin.

The package is written to a folder with a dist-info, as pip would leave it, and seen by other processes through
PYTHONPATH. The weights and config.json are written by hand, as that company's own trainer would. The core is not
touched; with one reader of the shared norm forgotten, the plugin is refused before a weight is read.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import awq_core
from awq_core.errors import UnsupportedModelError
from awq_core.testing import tiny_tokenizer

WIDTH, HEADS, DEPTH, VOCABULARY, INNER = 64, 4, 3, 112, 160

PYPROJECT = """
    [build-system]
    requires = ["hatchling>=1.26"]
    build-backend = "hatchling.build"

    [project]
    name = "awq-plugin-sequoia"
    version = "0.3.0"
    dependencies = ["awq-core>=0.1,<0.2"]

    [project.entry-points."awq.plugins"]
    sequoia = "awq_plugin_sequoia"
"""

PLUGIN = '''
    """Sequoia: attention and MLP side by side behind one LayerNorm, q, k and v in one linear, a GELU between."""

    from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl

    SEQUOIA = Architecture(
        family="sequoia",
        model_types=("sequoia",),
        auto_module="awq_plugin_sequoia.modeling",
        stacks=(LayerStack(component="language", blocks="decoder.units"),),
        scale_groups=(
            ScaleGroup(prev="norm", layers=(READERS), no_clip=("mix.qkv",)),
            ScaleGroup(prev="mix.qkv", layers=("mix.out",), prev_rows="last"),
        ),
        exempt=("feed.narrow",),  # a GELU stands before it, which no scale passes through
    )

    @hookimpl
    def awq_architectures():
        return (SEQUOIA,)
'''

MODELING = '''
    """The company's model, as its own code builds it. Field and module names follow nobody's habits."""

    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput


    class SequoiaConfig(PretrainedConfig):
        model_type = "sequoia"

        def __init__(self, vocab_size=112, breadth=64, units=3, eyes=4, inner=160, reach=128, **kwargs):
            self.vocab_size, self.breadth, self.units, self.eyes = vocab_size, breadth, units, eyes
            self.inner, self.reach = inner, reach
            super().__init__(**kwargs)


    class Mix(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.eyes = config.eyes
            self.qkv = nn.Linear(config.breadth, 3 * config.breadth)
            self.out = nn.Linear(config.breadth, config.breadth)

        def forward(self, x, mask):
            q, k, v = (part.unflatten(-1, (self.eyes, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))


    class Feed(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.wide = nn.Linear(config.breadth, config.inner)
            self.narrow = nn.Linear(config.inner, config.breadth)

        def forward(self, x):
            return self.narrow(nn.functional.gelu(self.wide(x)))


    class Unit(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.norm = nn.LayerNorm(config.breadth)
            self.mix, self.feed = Mix(config), Feed(config)

        def forward(self, hidden_states, mask):
            x = self.norm(hidden_states)
            return hidden_states + self.mix(x, mask) + self.feed(x)


    class Decoder(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.words = nn.Embedding(config.vocab_size, config.breadth)
            self.places = nn.Embedding(config.reach, config.breadth)
            self.units = nn.ModuleList(Unit(config) for _ in range(config.units))
            self.last = nn.LayerNorm(config.breadth)

        def forward(self, ids, attention_mask):
            count = ids.shape[1]
            seen = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril()[None, None]
            if attention_mask is not None:
                itself = torch.eye(count, dtype=torch.bool, device=ids.device)
                seen = seen & attention_mask.bool()[:, None, None] | itself
            x = self.words(ids) + self.places(torch.arange(count, device=ids.device))
            for unit in self.units:
                x = unit(x, seen)
            return self.last(x)


    class SequoiaForCausalLM(PreTrainedModel, GenerationMixin):
        config_class = SequoiaConfig
        base_model_prefix = "decoder"

        def __init__(self, config):
            super().__init__(config)
            self.decoder = Decoder(config)
            self.predict = nn.Linear(config.breadth, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return CausalLMOutput(logits=self.predict(self.decoder(input_ids, attention_mask)))

        def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
            return {"input_ids": input_ids, "attention_mask": attention_mask}


    AutoConfig.register("sequoia", SequoiaConfig)
    AutoModelForCausalLM.register(SequoiaConfig, SequoiaForCausalLM)
'''

USER = '''
    """What a user of the plugin does. Prints what came of it as JSON."""

    import json
    import sys

    import torch
    from transformers import AutoTokenizer

    import awq_core
    from awq_core.evaluation import perplexity

    source, out, corpus = sys.argv[1:]
    config = awq_core.QuantConfig(group_size=32)
    plan = awq_core.plan(source, config=config)
    assert "awq_plugin_sequoia.modeling" in sys.modules
    result = awq_core.quantize(source, out, config=config, calibration=corpus, samples=8, seq_len=32)
    original, quantized, expected = awq_core.load(source), awq_core.load(out), awq_core.load(out, fake_quant=True)
    ids = torch.randint(7, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, got, want = (model(input_ids=ids).logits for model in (original, quantized, expected))
    made = quantized.generate(input_ids=ids, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0)
    tokenizer, text = AutoTokenizer.from_pretrained(out), open(corpus).read()
    print(json.dumps({
        "family": plan.family,
        "dist": plan.dist,
        "version": plan.version,
        "quantized": [linear.name for linear in plan.linears if linear.quantize],
        "kept": {linear.name: linear.reason for linear in plan.linears if not linear.quantize},
        "groups": [[group.prev, list(group.layers)] for group in plan.blocks[0].groups],
        "same_plan": plan.blocks == result.plan.blocks,
        "proof": result.proof.error,
        "better": sum(r.loss for r in result.reports) / sum(r.loss_rtn for r in result.reports),
        "kernels": sorted({module.backend for module in quantized.modules() if hasattr(module, "backend")}),
        "class": type(quantized).__name__,
        "logits": first.tolist(),
        "kernel_error": float((got - want).norm() / want.norm()),
        "error": float((got - first).norm() / first.norm()),
        "generated": list(made.shape),
        "starts_with_prompt": torch.equal(made[:, :12], ids),
        "perplexity": [perplexity(model, tokenizer, text, window=32).perplexity for model in (original, quantized)],
    }))
'''


def install(site: Path, readers: str) -> Path:
    """The package as pip leaves it: modules, and a dist-info with its metadata and entry points."""
    package, info = site / "awq_plugin_sequoia", site / "awq_plugin_sequoia-0.3.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(PLUGIN).replace("READERS", readers))
    (package / "modeling.py").write_text(textwrap.dedent(MODELING))
    (site / "pyproject.toml").write_text(textwrap.dedent(PYPROJECT))
    requires = "Requires-Dist: awq-core<0.2,>=0.1\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: awq-plugin-sequoia\nVersion: 0.3.0\n{requires}")
    (info / "entry_points.txt").write_text("[awq.plugins]\nsequoia = awq_plugin_sequoia\n")
    return site


def weights() -> dict[str, torch.Tensor]:
    """A trained model's stand-in: no norm is one, no bias zero, a few channels stand out."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def vector(size, centre=0.0):
        return centre + 0.3 * torch.randn(size, generator=generator)

    tensors = {
        "decoder.words.weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
        "decoder.places.weight": 0.1 * torch.randn(128, WIDTH, generator=generator),
        "decoder.last.weight": vector(WIDTH, 1.0),
        "decoder.last.bias": vector(WIDTH),
        "predict.weight": matrix(VOCABULARY, WIDTH),
    }
    for unit in range(DEPTH):
        at = f"decoder.units.{unit}"
        norm = vector(WIDTH, 1.0)
        norm[:3] *= 8
        tensors |= {f"{at}.norm.weight": norm, f"{at}.norm.bias": vector(WIDTH)}
        for name, rows, columns in (
            ("mix.qkv", 3 * WIDTH, WIDTH),
            ("mix.out", WIDTH, WIDTH),
            ("feed.wide", INNER, WIDTH),
            ("feed.narrow", WIDTH, INNER),
        ):
            tensors |= {f"{at}.{name}.weight": matrix(rows, columns), f"{at}.{name}.bias": vector(rows)}
    return tensors


def answer(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The model once more, in plain arithmetic."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(name, x):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    count = ids.shape[1]
    x = t["decoder.words.weight"][ids] + t["decoder.places.weight"][:count]
    for unit in range(DEPTH):
        at = f"decoder.units.{unit}"
        y = norm(f"{at}.norm", x)
        heads = linear(f"{at}.mix.qkv", y).reshape(*ids.shape, 3, HEADS, WIDTH // HEADS)
        scores = torch.einsum("bihd,bjhd->bhij", heads[:, :, 0], heads[:, :, 1]) / (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", scores, heads[:, :, 2]).flatten(2)
        wide = linear(f"{at}.feed.wide", y)
        wide = wide * (1 + torch.erf(wide / 2**0.5)) / 2
        x = x + linear(f"{at}.mix.out", mixed) + linear(f"{at}.feed.narrow", wide)
    return norm("decoder.last", x) @ t["predict.weight"].T


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The company's checkpoint, written without transformers."""
    folder = tmp_path_factory.mktemp("sequoia") / "model"
    folder.mkdir()
    fields = {"vocab_size": VOCABULARY, "breadth": WIDTH, "units": DEPTH, "eyes": HEADS, "inner": INNER, "reach": 128}
    config = {"model_type": "sequoia", "architectures": ["SequoiaForCausalLM"], "dtype": "float32", **fields}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def run(site, *arguments):
    """Run Python where the plugin is installed beside whatever is installed here."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWQ_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["AWQ_KERNEL"] = "reference"
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def test_a_private_architecture_from_plan_to_perplexity(source, tmp_path, corpus):
    site = install(tmp_path / "site", '"mix.qkv", "feed.wide"')
    script, text, out = tmp_path / "user.py", tmp_path / "corpus.txt", tmp_path / "out"
    script.write_text(textwrap.dedent(USER))
    text.write_text("\n".join(corpus))
    done = run(site, script, source, out, text)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    assert (found["family"], found["dist"], found["version"]) == ("sequoia", "awq-plugin-sequoia", "0.3.0")
    names = ["mix.qkv", "mix.out", "feed.wide", "feed.narrow"]
    assert found["quantized"] == [f"decoder.units.{unit}.{name}" for unit in range(DEPTH) for name in names]
    assert list(found["kept"]) == ["predict"]
    assert found["groups"] == [["norm", ["mix.qkv", "feed.wide"]], ["mix.qkv", ["mix.out"]]]
    assert found["same_plan"] and found["proof"] < 1e-4
    assert found["better"] < 0.7, "three channels stand out: scales must help"
    assert found["class"] == "SequoiaForCausalLM"
    assert found["kernels"] in (["cpu"], ["reference"]), "the second where nothing could be compiled"

    ids = torch.randint(7, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(found["logits"]).double(), answer(weights(), ids), rtol=1e-3, atol=1e-3)
    assert found["kernel_error"] < 1e-4
    assert found["error"] < 0.25
    assert found["generated"] == [2, 15] and found["starts_with_prompt"]
    before, after = found["perplexity"]
    assert abs(after / before - 1) < 0.1

    stored = load_file(out / "model.safetensors")
    assert {name.rpartition(".")[0] for name in stored if name.endswith(".qweight")} == set(found["quantized"])
    for name in ("decoder.words.weight", "predict.weight", "decoder.units.2.feed.narrow.bias"):
        assert torch.equal(stored[name], weights()[name])
    assert not torch.equal(stored["decoder.units.0.norm.weight"], weights()["decoder.units.0.norm.weight"])


def test_a_forgotten_reader_is_refused_by_name(source, tmp_path):
    """The MLP reads the norm beside the attention; scaled without it, shapes are right and the function is not."""
    site, out = install(tmp_path / "site", '"mix.qkv",'), tmp_path / "out"
    done = run(site, "-m", "awq_core.cli", "quantize", source, "--out", out, "--group-size", "32", "--no-scale")
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for words in ("awq-plugin-sequoia 0.3.0", "decoder.units.0: norm -> mix.qkv", "function", "Nothing was quantized"):
        assert words in line
    assert not out.exists()


def test_without_the_plugin_it_is_unknown(source, one_line):
    with pytest.raises(UnsupportedModelError) as caught:
        awq_core.plan(source)
    one_line(caught.value, "'sequoia'", "plugin of your own")
    assert caught.value.exit_code == 3
