"""What quantizing each component costs: against weights rounded, and divergences summed, by plain code of this file."""

import copy
import json
import math
import re
import statistics
import types
from pathlib import Path

import pytest
import torch

import awq_core
from awq_core.components import component_effects, split
from awq_core.config import QuantConfig
from awq_core.errors import CalibrationError, ConfigError
from awq_core.evaluation.samples import placeholder_ids, predicts_text, sample_divergence, text_logits
from awq_core.hooks.manager import PluginManager

G = 32
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer
RTN = QuantConfig(group_size=G, scale=False, clip="none")
STACKS = {
    "vision": "model.vision_tower.encoder.layers",
    "projector": "model.multi_modal_projector",
    "language": "model.language_model.layers",
}


@pytest.fixture(scope="module")
def source(tiny_llava):
    return tiny_llava


@pytest.fixture(scope="module")
def manager(llava_plugin):
    made = PluginManager(allow=())
    made.register(*llava_plugin)
    return made


@pytest.fixture(scope="module")
def effects(source, pictures, manager):
    return component_effects(source, pictures, config=RTN, measured=2, manager=manager)


# -- the oracle


def rounded(weight):
    """Each group of 32 on its own 16 levels from minimum to maximum, zero among them; the step in fp16."""
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], G):
            part = weight[row, start : start + G]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            step = float(torch.tensor((high - low) / 15).half())
            zero = min(15, max(0, round(-low / step)))
            for column, value in enumerate(part.tolist()):
                level = min(15, max(0, round(value / step) + zero))
                result[row, start + column] = (level - zero) * step
    return result


def divergence_of(right, other, ids):
    """(KL, agreement) of one sample, position by position in Python floats, where the next token is text."""
    kls, agreements = [], []
    for position in range(len(ids)):
        if position + 1 < len(ids) and ids[position + 1] == IMAGE:
            continue
        p, q = (logits[position].double().tolist() for logits in (right, other))
        log_p, log_q = ([x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in (p, q))
        kls.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
        agreements.append(p.index(max(p)) == q.index(max(q)))
    return statistics.fmean(kls), statistics.fmean(agreements)


@pytest.mark.parametrize("name", ["vision", "projector", "language"])
def test_each_component_alone(name, source, pictures, manager, effects):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from awq_core.calibration.sources import read_samples

    original = AutoModelForImageTextToText.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    changed = copy.deepcopy(original)
    linears = [
        (path, module)
        for path, module in changed.named_modules()
        if isinstance(module, torch.nn.Linear) and (path + ".").startswith(STACKS[name] + ".")
    ]
    for _, module in linears:
        module.weight.data = rounded(module.weight.data)
    measured = list(read_samples(pictures, shuffle=True, seed=0))[-2:]
    assert all(isinstance(sample["images"][0], Image.Image) for sample in measured)
    found = []
    for sample in measured:
        batch = processor(text="<image>" + sample["text"], images=sample["images"], return_tensors="pt")
        with torch.no_grad():
            logits = [model(**batch).logits[0] for model in (original, changed)]
        found.append(divergence_of(*logits, batch["input_ids"][0].tolist()))

    (one,) = (effect for effect in effects.effects if effect.component == name)
    kls, agreements = zip(*found, strict=True)
    assert one.linears == len(linears) and one.reason == ""
    assert one.kl.mean == pytest.approx(statistics.fmean(kls), rel=2e-3) and one.kl.mean > 1e-6
    assert one.kl.stderr == pytest.approx(statistics.stdev(kls) / math.sqrt(2), rel=2e-2)
    assert one.agreement.mean == pytest.approx(statistics.fmean(agreements))
    # Four bits a weight in the place of 32, and of each group of 32 an fp16 step and a zero of 4 bits.
    weights = sum(module.weight.numel() for _, module in linears)
    assert one.bytes_saved == weights * 4 - weights // 2 - weights // G * 2 - weights // G // 2


def test_what_was_measured_on(effects, source):
    assert [one.component for one in effects.effects] == ["vision", "projector", "language"]
    assert [one.default for one in effects.effects] == ["keep", "keep", "quantize"]
    assert (effects.measured, effects.calibrated) == (2, 3)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert effects.bytes_before == pytest.approx(total, rel=0.05)


def test_calibrated_components_are_the_ones_a_run_makes(source, pictures, manager, tmp_path):
    """The samples that are measured on take no part in calibration: a run on the others alone has the same effect."""
    from awq_core.calibration.prepare import Preprocessors, prepare
    from awq_core.model_folder import open_config

    config = QuantConfig(group_size=G, components={"vision": "keep", "language": "keep"})
    found = component_effects(source, pictures, config=config, measured=2, manager=manager)
    assert [one.component for one in found.effects] == ["projector"]
    _, owner = open_config(source, manager)
    options = {"samples": 5, "seq_len": 1, "seed": 0, "vocab_size": None}
    make = lambda processor, sample: manager.calibration_batch(owner, processor, sample)  # noqa: E731
    data, held_out = split(prepare(pictures, Preprocessors(source, None, False), make, **options), 2)
    alone = QuantConfig(group_size=G, components={"vision": "keep", "language": "keep", "projector": "4bit"})
    awq_core.quantize(source, tmp_path / "out", config=alone, calibration=data, manager=manager)
    models = [awq_core.load(folder, fake_quant=True, manager=manager) for folder in (source, tmp_path / "out")]
    apart = sample_divergence(*(text_logits(model, held_out) for model in models))
    assert found.effects[0].kl == apart.kl and apart.kl.mean > 0
    assert found.positions == apart.positions


def test_components_that_cannot_be_measured_say_why(source, manager, pictures):
    found = component_effects(
        source, pictures, config=QuantConfig(group_size=128), samples=3, measured=2, manager=manager
    )
    reasons = {one.component: one.reason for one in found.effects}
    assert all("128" in reason for reason in reasons.values())
    assert all(one.kl is None and one.linears == one.bytes_saved == 0 for one in found.effects)


def test_a_component_that_no_sample_reaches(source, pictures, manager, monkeypatch):
    """Sound, say, in a model that is given images."""
    import awq_core.components as module

    quantize = module.quantize

    def unreached(folder, out, *, config, **options):
        if config.components["projector"] == "4bit":
            raise CalibrationError("no calibration sample reaches the projector")
        return quantize(folder, out, config=config, **options)

    monkeypatch.setattr(module, "quantize", unreached)
    found = component_effects(
        source, pictures, config=QuantConfig(group_size=G, components={"language": "keep"}), manager=manager
    )
    vision, projector = found.effects
    assert projector.reason == "no calibration sample reaches the projector" and projector.kl is None
    assert vision.kl.mean > 0 and vision.reason == ""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QuantConfig(lm_head=True), "output head"),
        (QuantConfig(components={"audio": "4bit"}), "no component 'audio'"),
        (
            QuantConfig(components={"vision": "keep", "projector": "keep", "language": "keep"}),
            "every component is kept",
        ),
    ],
)
def test_impossible_wishes(config, words, source, pictures, manager, one_line):
    with pytest.raises(ConfigError) as raised:
        component_effects(source, pictures, config=config, manager=manager)
    one_line(raised.value, words)


def test_text_and_single_samples_are_refused(source, pictures, manager, corpus):
    from PIL import Image

    with pytest.raises(CalibrationError, match="holds no images"):
        component_effects(source, corpus * 30, config=RTN, manager=manager)
    single = [{"text": "one", "images": [Image.open(pictures / "0.png")]}]
    with pytest.raises(CalibrationError, match="one sample"):
        component_effects(source, single, config=RTN, manager=manager)
    with pytest.raises(ConfigError, match="measured=0"):
        component_effects(source, pictures, config=RTN, measured=0, manager=manager)


def test_eight_bits_need_another_format(one_line):
    with pytest.raises(ConfigError) as raised:
        QuantConfig(components={"vision": "8bit"})
    one_line(raised.value, "vision=8bit", "another format", "keep, 4bit")


# -- which positions count


def test_positions_that_predict_text():
    ids = torch.tensor([[7, 2, 2, 2, 8, 9, 3, 3, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    counts = predicts_text({"input_ids": ids, "attention_mask": mask}, frozenset({2, 3}))
    # Before 8, the first text after the image; before 9; before 5; and 5, where generation would begin.
    assert counts[0].nonzero()[:, 0].tolist() == [3, 4, 7, 8]
    assert predicts_text({"input_ids": ids}, frozenset()).all()


def test_placeholders_are_found_by_their_names():
    values = {
        "image_token_index": 9,
        "video_token_id": 8,
        "image_size": 5,
        "eos_token_id": 1,
        "image_token_id": None,
        "vision_config": {"image_patch_id": 7, "image_grid": [3]},
        "audio_config": {"audio_token_id": 6},
    }
    assert placeholder_ids(types.SimpleNamespace(to_dict=lambda: values)) == {6, 7, 8, 9}


def test_models_on_unlike_samples_are_refused():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    same = sample_divergence([logits], [logits])
    assert same.kl.mean == 0 and same.agreement.mean == 1 and same.positions == 3
    for other in ([], [logits, logits], [logits[:2]], [logits[:, :4]]):
        with pytest.raises(ConfigError):
            sample_divergence([logits], other)


# -- the command


def test_the_command(llava_awq, source, pictures, effects):
    words = ["components", source, "--images", pictures, "--measure", 2, "--group-size", G, "--no-scale"]
    shown = json.loads(llava_awq(*words, "--json").stdout)
    assert shown["effects"] == json.loads(json.dumps(effects.to_dict()))["effects"]
    assert (shown["measured"], shown["calibrated"], shown["config"]["group_size"]) == (2, 3, G)
    text = llava_awq(*words, "--component", "language=keep")
    assert text.exit_code == 0 and "projector" in text.stdout and "language" not in text.stdout
    assert "over 2 samples of" in text.stdout and "calibrated on 3 others" in text.stdout


def test_the_example_in_the_documentation(llava_awq, source, pictures, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "plugins" / "vision.md").read_text(encoding="utf-8")
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "component_effects" in text)
    (tmp_path / "MODEL").symlink_to(source)
    (tmp_path / "photos").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "vision.md", "exec"), {})
    names, *_ = zip(*(line.split() for line in capsys.readouterr().out.splitlines()), strict=True)
    assert names == ("vision", "projector", "language")


def test_the_command_refuses_in_a_line(llava_awq, source, pictures):
    refused = llava_awq("components", source, "--images", pictures, "--component", "vision=8bit")
    assert refused.exit_code == 2 and "other widths need another format" in refused.stderr
