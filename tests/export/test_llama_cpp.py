"""GGUF files in llama.cpp, where llama-cpp-python is installed: logits and text against transformers."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import awq_core
from awq_core.export.formats import export_checkpoint
from awq_core.export.gguf_architectures import KNOWN
from awq_core.export.gguf_tokenizer import PRE, add_tokenizer

from .gguf_models import FORMS, ROOT, opened, quantized, tiny_config
from .gguf_tokenizers import PIECES, TEXTS, splitting

llama_cpp = pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")


@pytest.fixture
def llama(monkeypatch):
    """llama("DIR", vocab_only=True): the file in llama.cpp, without its layouts for AMX, which crash in places."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain():
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain)
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    return lambda folder, **more: llama_cpp.Llama(str(folder / "model.gguf"), **options, **more)


def expected_tokens(model, ids, new):
    found, fresh, past = [], ids, None
    with torch.no_grad():
        for _ in range(new):
            step = model(torch.tensor([fresh]), past_key_values=past, use_cache=True)
            fresh, past = [int(step.logits[0, -1].argmax())], step.past_key_values
            found += fresh
    return found


def run(model, ids, new=0):
    """Logits `[tokens, vocabulary]`, and greedy tokens."""
    model.reset()
    model.eval(ids)
    logits, found = np.array(model.scores[: len(ids)]), []
    for _ in range(new):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval([found[-1]])
    return torch.from_numpy(logits), found


def test_text(quantized_pycoder, exported, llama):
    tokenizer, ours = (
        AutoTokenizer.from_pretrained(quantized_pycoder),
        awq_core.load(quantized_pycoder, dtype="float32"),
    )
    theirs = llama(exported("gguf-fp16"))
    ids = tokenizer(TEXTS[0]).input_ids
    logits, tokens = run(theirs, ids, 40)
    assert tokens == expected_tokens(ours, ids, 40)
    with torch.no_grad():
        expected = ours(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * float(expected.std()))


def unpacked(folder, rounding=False):
    """The model in float32.

    Args:
        rounding: round what quantized linears read as llama.cpp does for Q4_1: to 8 bits, with one step for 32 inputs.
    """
    model = awq_core.load(folder, dtype="float32", fake_quant=True)

    def rounded(_, args):
        blocks = args[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (((blocks / step).round() * step).flatten(-2), *args[1:])

    for name, module in model.model.layers.named_modules():
        if rounding and isinstance(module, torch.nn.Linear) and not name.endswith("gate"):
            module.register_forward_pre_hook(rounded)
    return model


def logits_of(model, ids):
    """`[tokens, vocabulary]`"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def eight_bits(quantized_pycoder):
    """The demo model as it is, and as llama.cpp computes it."""
    return unpacked(quantized_pycoder), unpacked(quantized_pycoder, rounding=True)


def test_logits_from_the_codes(quantized_pycoder, exported, llama, eight_bits):
    """For Q4_1 it rounds activations to 8 bits. The error is that which the same rounding makes here."""
    ids = AutoTokenizer.from_pretrained(quantized_pycoder)(TEXTS[1]).input_ids
    logits, _ = run(llama(exported("gguf")), ids)
    exact, rounding = (logits_of(model, ids) for model in eight_bits)
    error = (rounding - exact).pow(2).mean().sqrt()
    assert (logits - exact).pow(2).mean().sqrt() < 1.5 * error
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


PROMPTS = (
    *TEXTS[:2], "import os\nimport sys\n", "class Stack:\n    def __init__(self", "for line in open(path):\n",
    "if __name__ == ", "    try:\n        value = int(text)\n    except ", "def add(a, b):\n    return", "# Copyright",
    "with open(name, 'w') as file:\n    ",
)  # fmt: skip


def test_text_from_the_codes(quantized_pycoder, exported, llama, eight_bits):
    """Greedy text is the torch model's, most of it to the end; where it turns, the two tokens were nearer than what
    rounding to 8 bits moves the difference of two logits by."""
    tokenizer, theirs = AutoTokenizer.from_pretrained(quantized_pycoder), llama(exported("gguf"))
    exact, rounding = eight_bits
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected, (_, found) = expected_tokens(exact, ids, 32), run(theirs, ids, 32)
        same += found == expected
        if found != expected:
            turn = next(place for place in range(32) if found[place] != expected[place])
            before, after = (logits_of(model, ids + expected[:turn])[-1] for model in (exact, rounding))
            error = float((after - before).pow(2).mean().sqrt())
            gap = float(before[expected[turn]] - before[found[turn]])
            assert gap < 3 * 2**0.5 * error, (prompt, turn, gap, error)
    assert same > len(PROMPTS) / 2


def test_a_quantized_head(tmp_path, llama_config, llama):
    """Of a model whose head was tied: the file has both."""
    from awq_core.testing import save_tiny

    save_tiny(llama_config(vocab_size=4096, tie_word_embeddings=True), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_bytes((ROOT / "examples" / "pycoder" / name).read_bytes())
    settings = awq_core.QuantConfig(group_size=32, scale=False, clip="none", lm_head=True)
    awq_core.quantize(tmp_path / "source", tmp_path / "DIR", config=settings)
    made = export_checkpoint(tmp_path / "DIR", tmp_path / "x", "gguf-fp16").out
    assert {"token_embd.weight", "output.weight"} <= set(opened(made)[0])
    ids = list(range(100, 120))
    logits, _ = run(llama(made), ids)
    with torch.no_grad():
        expected = awq_core.load(tmp_path / "DIR", dtype="float32")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03 * float(expected.std()))


def test_tokens(quantized_pycoder, exported, sentencepiece_folder, llama, tmp_path):
    pieces = export_checkpoint(sentencepiece_folder, tmp_path / "x", "gguf").out
    for folder, made in ((quantized_pycoder, exported("gguf")), (sentencepiece_folder, pieces)):
        tokenizer, theirs = AutoTokenizer.from_pretrained(folder), llama(made, vocab_only=True)
        for text in TEXTS:
            assert theirs.tokenize(text.encode(), special=True) == tokenizer(text).input_ids, text


@pytest.mark.parametrize("steps", list(PRE), ids=[names[0] for names in PRE.values()])
def test_ways_to_split(steps, llama, tmp_path):
    """A file with nothing but a tokenizer."""
    (tmp_path / "tokenizer.json").write_text(splitting(steps))
    shutil.copy(ROOT / "examples" / "pycoder" / "tokenizer_config.json", tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add_tokenizer(writer, tmp_path, 4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), llama(tmp_path, vocab_only=True)
    for text in (*TEXTS, *PIECES):
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours(text).input_ids, text


@pytest.mark.parametrize("form", [*sorted(KNOWN), *FORMS])
def test_architectures(form, llama, tmp_path):
    name, more = FORMS.get(form, (form, {}))
    folder = quantized(tiny_config(name, **more), tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(0, 4096, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, _ = run(llama(export_checkpoint(folder, tmp_path / "x", "gguf-fp16").out), ids)
    with torch.no_grad():
        expected = awq_core.load(folder, dtype="float32")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03 * float(expected.std()))
    assert (logits - expected).pow(2).mean().sqrt() < 0.004 * expected.std()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_logits_from_the_codes_of_experts(name, llama, tmp_path):
    folder = quantized(tiny_config(name), tmp_path)
    ids = list(range(100, 120))
    logits, _ = run(llama(export_checkpoint(folder, tmp_path / "x", "gguf").out), ids)
    exact, rounding = (logits_of(unpacked(folder, rounding), ids) for rounding in (False, True))
    error = (rounding - exact).pow(2).mean().sqrt()
    assert (logits - exact).pow(2).mean().sqrt() < 1.5 * error < 0.1 * exact.std()
