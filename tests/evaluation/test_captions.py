"""Perplexity of captions given images: against losses and divergences that plain code of this file sums."""

import json
import math
import statistics
import types

import pytest
import torch

import awq_core
from awq_core.config import QuantConfig
from awq_core.errors import CalibrationError, ConfigError, NumericsError
from awq_core.evaluation import caption_batches, caption_perplexity
from awq_core.evaluation.samples import NOTHING, sample_loss, text_targets
from awq_core.hooks.manager import PluginManager

IMAGE = 2


@pytest.fixture(scope="module")
def manager(llava_plugin):
    made = PluginManager(allow=())
    made.register(*llava_plugin)
    return made


@pytest.fixture(scope="module")
def quantized(tiny_llava, manager, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    text = [{"text": "a picture of noise " * 40}] * 8
    config = QuantConfig(group_size=32, scale=False, clip="none")
    awq_core.quantize(tiny_llava, out, config=config, calibration=text, samples=2, seq_len=32, manager=manager)
    return out


# -- the oracle


def log_softmax(row):
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def measured(logits, ids, other=None):
    """Mean loss, KL to `other` and agreement where the next token is there and is text, in Python floats."""
    losses, kls, agreements = [], [], []
    for position in range(len(ids) - 1):
        if ids[position + 1] == IMAGE:
            continue
        q = log_softmax(logits[position].double().tolist())
        losses.append(-q[ids[position + 1]])
        if other is not None:
            p = log_softmax(other[position].double().tolist())
            kls.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            agreements.append(p.index(max(p)) == q.index(max(q)))
    rest = (statistics.fmean(kls), statistics.fmean(agreements)) if other is not None else ()
    return (statistics.fmean(losses), *rest, len(losses))


def logits_of(model, folder, pictures):
    """(logits, ids) of each picture and its caption, read and put together here."""
    from PIL import Image
    from transformers import AutoProcessor

    processor, found = AutoProcessor.from_pretrained(folder), []
    for path in sorted(pictures.glob("*.png")):
        text = "<image>" + path.with_suffix(".txt").read_text()
        batch = processor(text=text, images=[Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            found.append((model(**batch).logits[0], batch["input_ids"][0].tolist()))
    return found


def test_perplexity_and_divergence(tiny_llava, quantized, pictures, manager):
    """Five samples, of unequal length; their order does not matter."""
    from transformers import AutoModelForImageTextToText

    original = AutoModelForImageTextToText.from_pretrained(tiny_llava).eval()
    changed = awq_core.load(quantized, fake_quant=True, manager=manager)
    theirs = logits_of(original, tiny_llava, pictures)
    mine = logits_of(changed, tiny_llava, pictures)
    right = [measured(logits, ids)[0] for logits, ids in theirs]
    rows = [measured(logits, ids, other) for (logits, ids), (other, _) in zip(mine, theirs, strict=True)]
    losses, kls, agreements, tokens = zip(*rows, strict=True)

    batches = caption_batches(quantized, pictures, samples=9, manager=manager).batches
    seen = []
    found = caption_perplexity(changed, batches, reference=original, progress=lambda *done: seen.append(done))
    assert (found.samples, found.tokens, seen[-1]) == (5, sum(tokens), (5, 5))
    assert len(set(tokens)) > 1
    root, mean, before = math.sqrt(5), statistics.fmean(losses), statistics.fmean(right)
    assert found.loss.mean == pytest.approx(mean, rel=1e-5)
    assert found.loss.stderr == pytest.approx(statistics.stdev(losses) / root, rel=1e-3)
    assert found.perplexity.mean == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.perplexity.stderr == pytest.approx(math.exp(mean) * statistics.stdev(losses) / root, rel=1e-3)
    against = found.against
    assert against.perplexity.mean == pytest.approx(math.exp(before), rel=1e-5)
    assert against.difference.mean == pytest.approx(math.exp(mean) - math.exp(before), abs=1e-3)
    pairs = zip(losses, right, strict=True)
    apart = [math.exp(mean) * (1 + a - mean) - math.exp(before) * (1 + b - before) for a, b in pairs]
    assert against.difference.stderr == pytest.approx(statistics.stdev(apart) / root, rel=1e-2)
    assert against.kl.mean == pytest.approx(statistics.fmean(kls), rel=2e-3) and against.kl.mean > 1e-6
    assert against.kl.stderr == pytest.approx(statistics.stdev(kls) / root, rel=1e-2)
    assert against.agreement.mean == pytest.approx(statistics.fmean(agreements))


def test_bfloat16_and_one_sample(tiny_llava, pictures, manager):
    model = awq_core.load(tiny_llava, manager=manager)
    (batch,) = caption_batches(tiny_llava, pictures, samples=1, manager=manager).batches
    exact, rounded = caption_perplexity(model, [batch]), caption_perplexity(model.to(torch.bfloat16), [batch])
    assert rounded.loss.mean == pytest.approx(exact.loss.mean, rel=2e-2)
    assert rounded.loss.mean != exact.loss.mean
    assert math.isnan(exact.loss.stderr) and math.isnan(exact.perplexity.stderr) and exact.against is None


def test_padding_changes_nothing(tiny_llava, pictures, manager):
    """On either side: padding is neither predicted nor predicted from."""
    model = awq_core.load(tiny_llava, manager=manager)
    (batch,) = caption_batches(tiny_llava, pictures, samples=1, manager=manager).batches
    plain = caption_perplexity(model, [batch])
    mask = torch.ones_like(batch["input_ids"])
    pad = torch.zeros_like(mask[:, :3])
    for order in ((0, 1), (1, 0)):
        ids, seen = ([(row, pad)[one] for one in order] for row in (batch["input_ids"], mask))
        padded = {**batch, "input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(seen, 1)}
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
        found = caption_perplexity(model, [padded])
        assert found.tokens == plain.tokens
        assert found.loss.mean == pytest.approx(plain.loss.mean, rel=1e-5)


def test_the_tokens_predicted():
    ids = torch.tensor([[7, 2, 2, 8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert text_targets({"input_ids": ids, "attention_mask": mask}, frozenset({2})).tolist() == [8, 9, NOTHING]
    assert text_targets({"input_ids": ids}, frozenset({2})).tolist() == [8, 9, 0, 0, NOTHING]


def test_refusals(tiny_llava, corpus, manager, one_line):
    with pytest.raises(CalibrationError, match="holds no images"):
        caption_batches(tiny_llava, corpus, samples=4, manager=manager)
    with pytest.raises(ConfigError, match="no samples"):
        caption_perplexity(types.SimpleNamespace(), [])
    logits = torch.zeros(2, 5)
    with pytest.raises(ConfigError) as raised:
        sample_loss(logits[:1], torch.tensor([NOTHING]), 3)
    one_line(raised.value, "sample 3 has no text")
    with pytest.raises(NumericsError):
        sample_loss(logits * math.nan, torch.tensor([1, 2]))
    assert sample_loss(logits, torch.tensor([1, NOTHING])) == pytest.approx(math.log(5))


# -- the command


def test_the_command(llava_awq, tiny_llava, quantized, pictures):
    words = ["eval", quantized, "--images", pictures, "--against", tiny_llava]
    done = llava_awq(*words, "--json", "--gate", "ppl>1", "--gate", "ppl_increase<50%", "--gate", "kl<1")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    images = shown["images"]
    assert shown["perplexity"] is None and images["samples"] == 5 and images["against"]["model"] == str(tiny_llava)
    assert [gate["met"] for gate in shown["gates"]] == [True] * 3
    assert shown["gates"][0]["value"] == images["perplexity"]["mean"]
    before = images["against"]["perplexity"]["mean"]
    assert shown["gates"][1]["value"] == pytest.approx(images["perplexity"]["mean"] / before - 1)
    assert shown["gates"][2]["value"] == images["against"]["kl"]["mean"] > 0

    text = llava_awq(*words, "--measure", 2, "--gate", "kl<0")
    assert text.exit_code == 5 and "NOT MET" in text.stdout
    names = [line.split()[0] for line in text.stdout.splitlines()]
    assert names == ["perplexity", "original", "difference", "KL", "agreement", "protocol", "gate"]
    assert "2 samples" in text.stdout and " ± " in text.stdout
    alone = llava_awq("eval", quantized, "--images", pictures, "--measure", 1)
    assert alone.exit_code == 0 and " ± s" in alone.stdout and "nan" not in alone.stdout
    assert [line.split()[0] for line in alone.stdout.splitlines()] == ["perplexity", "protocol"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--images", "x", "--text", "y"), "--images is measured on its own"),
        (("--images", "x", "--window", 64), "--images is measured on its own"),
        (("--measure", 2), "--measure is of --images"),
        (("--images", "x", "--against", "y", "--cache", "z"), "--cache is of"),
        (("--images", "x", "--gate", "kl<1"), "--against ORIGINAL"),
        (("--images", "x", "--against", "y", "--gate", "kl_p999<1"), "no metric 'kl_p999'"),
    ],
)
def test_the_command_refuses(llava_awq, tiny_llava, words, said):
    done = llava_awq("eval", tiny_llava, *words)
    assert done.exit_code == 2 and said in done.stderr


def test_a_source_that_is_not_there(llava_awq, tiny_llava):
    done = llava_awq("eval", tiny_llava, "--images", "nowhere.jsonl")
    assert done.exit_code == CalibrationError.exit_code and "nowhere.jsonl" in done.stderr
