"""`--recipe`: any option from a file, typed ones win, mistakes are named; what lies beside the weights runs again."""

import json
import os
import re
import shutil
from pathlib import Path

import click
import pytest
import yaml

import awq_core
from awq_core import QuantConfig
from awq_core.cli.app import cli
from awq_core.cli.quantize import quantize
from awq_core.cli.recipe import keys_of

# What is no part of the recipe beside the weights: where it was written to, how it was told, and what others imply.
NOT_SAVED = {
    "out",
    "json",
    "restart",
    "no_clip",
    "offload",
    "layers_per_batch",
    "target_bits",
    "target_size",
    "engine",
    "address",
}
CONSENT = {"trust_remote_code"}
GIVEN_ONLY = {"reuse", "infer", "calib_subsets", "calib_exclude"}  # saved where they were given


@pytest.fixture
def desk(tmp_path, monkeypatch, llama_source, corpus_file):
    """A folder to work in, with MODEL, corpus.txt and data/corpus.txt."""
    shutil.copytree(llama_source, tmp_path / "MODEL")
    (tmp_path / "data").mkdir()
    shutil.copy(corpus_file, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(tmp_path):
    """recipe("group_size: 32"): the path of a file that holds this."""

    def write(text):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def asked(monkeypatch):
    """asked(awq(...)) -> what the program asked `awq_core.plan` for: its arguments by name."""
    calls = []

    class Planned:
        def to_dict(self):
            return {}

    monkeypatch.setattr(
        awq_core, "plan", lambda model, **options: calls.append({"model": model, **options}) or Planned()
    )
    monkeypatch.setattr("awq_core.cli.plan.kernels_here", lambda *opened: ("cpu", "float32", ()))
    return lambda result: calls[-1]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# -- what wins


def test_a_recipe_replaces_the_defaults(awq, asked, recipe):
    given = recipe(
        """
        model: org/name
        group-size: 32
        seq_len: 64
        no_scale: yes
        clip: asymmetric
        component: {language: 4bit, vision: keep}
        keep: [q_proj, layers.0.mlp]
        plugin: tiny
        json: true
        """
    )
    call = asked(awq("plan", "--recipe", given))
    assert call["config"] == QuantConfig(
        group_size=32,
        scale=False,
        clip="asymmetric",
        components={"language": "4bit", "vision": "keep"},
        modules_to_not_convert=("q_proj", "layers.0.mlp"),
    )
    assert (call["model"], call["seq_len"], call["samples"], call["plugin"]) == ("org/name", 64, 128, "tiny")


def test_what_is_typed_wins_over_the_recipe(awq, asked, recipe):
    given = recipe(
        "{model: org/name, group_size: 32, component: {a: keep}, keep: [q_proj, k_proj], samples: 9, json: true}"
    )
    typed = ["MODEL", "--group-size", 128, "--component", "b=keep", "--keep", "v_proj"]
    for words in (["--recipe", given, *typed], [*typed, "--recipe", given]):
        call = asked(awq("plan", *words))
        assert call["model"] == "MODEL" and call["samples"] == 9
        assert call["config"] == QuantConfig(components={"b": "keep"}, modules_to_not_convert=("v_proj",))


@pytest.mark.parametrize(
    ("text", "typed", "clip"),
    [
        ("no_clip: true", [], "none"),
        ("no_clip: true", ["--clip", "asymmetric"], "asymmetric"),
        ("clip: asymmetric", ["--no-clip"], "none"),
        ("{clip: none, no_clip: true}", [], "none"),
        ("no_clip: false", [], "asymmetric"),
        ("no_clip: false", ["--no-clip"], "none"),
    ],
)
def test_clip_and_no_clip_are_one_setting(awq, asked, recipe, text, typed, clip):
    assert asked(awq("plan", "MODEL", "--recipe", recipe(text), *typed, "--json"))["config"].clip == clip


def test_typed_options_still_contradict_one_another(awq, recipe):
    words = ["--recipe", recipe("samples: 3"), "--no-clip", "--clip", "asymmetric"]
    assert "contradict one another" in awq("plan", "MODEL", *words, code=2).errors[-1]


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("component: [vision=keep]", {"components": {"vision": "keep"}}),
        ("component: vision=keep", {"components": {"vision": "keep"}}),
        ("keep: q_proj", {"modules_to_not_convert": ("q_proj",)}),
        ("keep: [no, 1.10]", {"modules_to_not_convert": ("no", "1.10")}),
        ("{group_size: , clip: null, keep: []}", {}),
        ("# nothing", {}),
        ("\ufeffgroup_size: 32", {"group_size": 32}),
    ],
)
def test_spellings(awq, asked, recipe, text, config):
    call = asked(awq("plan", "MODEL", "--recipe", recipe(text), "--json"))
    assert call["config"] == QuantConfig(**config)


def test_help_shows_the_defaults_of_the_recipe(awq, recipe):
    given = recipe("group_size: 32")
    for words in (["--recipe", given, "--help"], ["--group-size", 64, "--recipe", given, "--help"]):
        assert "-1 is a whole row.  [default: 32]" in " ".join(awq("quantize", *words).stdout.split()).replace(
            " [", "  ["
        )


def test_a_plan_takes_the_keys_it_shares_and_repeats_the_recipe(awq, recipe, llama_source):
    given = recipe("{out: DIR, calib: none.txt, device: cuda, dtype: bfloat16, seed: 3, group_size: 32}")
    result = awq("plan", llama_source, "--recipe", given)
    assert "in groups of 32" in result.stdout
    assert result.errors[-1] == f"next: awq quantize {llama_source} --recipe {given} --out DIR"


def test_the_recipe_in_the_documentation(awq, asked, recipe):
    page = (Path(__file__).parents[2] / "docs" / "quantize.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    call = asked(awq("plan", "--recipe", recipe(text), "--json"))
    assert call["model"] == "examples/pycoder" and call["config"].modules_to_not_convert == ("layers.0.mlp", "o_proj")


def test_every_option_may_come_from_a_recipe():
    context = click.Context(cli)
    for name in ("quantize", "plan"):
        command = cli.get_command(context, name)
        options = {opt for param in command.params for opt in param.opts if opt.startswith("--")} - {"--recipe"}
        assert {key.replace("_", "-") for key in keys_of(command)} == {"model", *(opt[2:] for opt in options)}


def test_json_asked_for_by_the_recipe_tells_the_error_too(awq, read_json, recipe, tmp_path):
    given = recipe(f"{{json: true, model: {tmp_path / 'none'}}}")
    assert "no such model folder" in read_json(awq("plan", "--recipe", given, code=1))["error"]


# -- what is wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grop_size: 32", "r.yaml: unknown key 'grop_size' - try: did you mean 'group_size'?"),
        ("components: {a: keep}", "r.yaml: unknown key 'components' - try: did you mean 'component'?"),
        ("modules_to_not_convert: [a]", "did you mean 'keep'?"),
        ("recipe: other.yaml", "r.yaml: unknown key 'recipe'"),
        ("zzz: 1", "r.yaml: unknown key 'zzz' - try: known: address, bits, calib"),
        ("<<: {bits: 4}", "r.yaml: unknown key '<<'"),
        ("group_size: abc", "r.yaml: group_size: 'abc' is not a valid integer - try: "),
        ("group_size: 48", "r.yaml: group_size=48 is not possible - try: one of 32, 64, 128, -1"),
        ("bits: 3", "r.yaml: bits=3 is not possible"),
        ("samples: 0", "r.yaml: samples: 0 is not in the range x>=1"),
        ("samples: 1.5", "r.yaml: samples: '1.5' is not a valid"),
        ("bits: true", "r.yaml: bits: 'true' is not a valid integer"),
        ("clip: no", "r.yaml: clip: 'no' is not one of"),
        ("no_clip: maybe", "r.yaml: no_clip: 'maybe' is not a valid boolean"),
        ("{no_clip: true, clip: asymmetric}", "r.yaml: no_clip and clip: asymmetric contradict one another"),
        ("component: {vision: 8bit}", "component vision=8bit: an AWQ checkpoint holds 4-bit weights"),
        ("component: {vision: }", "r.yaml: component: 'vision=' is not NAME=CHOICE"),
        ("component: [[vision]]", "r.yaml: component: a list is not possible here"),
        ("keep: {a: b}", "r.yaml: keep: a mapping is not possible here"),
        ("calib: [a.txt, b.txt]", "r.yaml: calib: a list is not possible here"),
        ("model: {name: a}", "r.yaml: model: a mapping is not possible here"),
        ("seed: !!int 3", "r.yaml: seed: a tagged value is not possible here"),
        ("seed: 1\nseed: 2", "r.yaml, line 2: not a recipe: 'seed' comes twice"),
        ("component: {a: keep, a: 4bit}", "r.yaml, line 1: not a recipe: 'a' comes twice"),
        ("seq-len: 1\nseq_len: 2", "r.yaml: seq_len and seq-len are the same key"),
        ("- bits: 4", "r.yaml: a recipe is a mapping of keys to values - try: "),
        ("bits", "r.yaml: a recipe is a mapping of keys to values"),
        ("bits: 4\nclip: [", "r.yaml, line 2: not a recipe: while parsing a flow"),
        ("bits: 4\n---\nbits: 4", "r.yaml, line 2: not a recipe: expected a single document"),
        ("bits: \x01", "r.yaml: not a recipe: special characters are not allowed"),
        ("? [a]\n: b", "r.yaml, line 1: not a recipe: while constructing a mapping, found unhashable key"),
        ('out: !!python/object/apply:os.mkdir ["made"]', "not a recipe: could not determine a constructor for the tag"),
        ("[" * 100_000, "r.yaml: nested too deeply"),
        (b"\xff\xfe\x00", "r.yaml: not UTF-8 text"),
        (b"#" * (1 << 20) + b"#", "r.yaml: too large for a recipe"),
    ],
)
def test_mistakes_are_one_line(awq, recipe, monkeypatch, tmp_path, text, words):
    monkeypatch.chdir(tmp_path)
    line = awq("quantize", "MODEL", "--out", "DIR", "--recipe", recipe(text), code=2).errors
    assert len(line) == 1 and line[0].startswith("awq: error: ") and words in line[0] and " - try: " in line[0]
    assert len(line[0]) < 500 and os.listdir(tmp_path) == ["r.yaml"]


def test_no_such_file(awq, read_json, tmp_path):
    result = awq("plan", "MODEL", "--recipe", tmp_path / "none.yaml", "--json", code=2)
    assert "none.yaml: no recipe can be read: No such file" in read_json(result)["error"]


def test_a_folder_is_no_recipe_but_may_hold_one(awq, tmp_path):
    assert "a folder, not a recipe" in awq("plan", "MODEL", "--recipe", tmp_path, code=2).errors[-1]
    (tmp_path / "recipe.yaml").write_text("bits: 4")
    line = awq("plan", "MODEL", "--recipe", tmp_path, code=2).errors[-1]
    assert line.endswith(f"try: {tmp_path / 'recipe.yaml'}")


def test_model_and_out_are_needed_from_somewhere(awq, recipe):
    assert "Missing argument 'MODEL'" in awq("quantize", "--recipe", recipe("out: DIR"), code=2).stderr
    assert "Missing option '--out'" in awq("quantize", "--recipe", recipe("model: MODEL"), code=2).stderr


# -- what is saved


def test_a_recipe_is_a_whole_run_and_the_saved_one_repeats_it(awq, desk, recipe):
    given = recipe(
        """
        model: MODEL
        out: first
        calib: data/corpus.txt
        samples: 2
        seq_len: 64
        seed: 7
        group_size: 32
        component: {language: 4bit}
        keep: [layers.1.mlp.gate]
        dtype: bfloat16
        """
    )
    awq("quantize", "--recipe", given)
    saved = yaml.safe_load((desk / "first" / "recipe.yaml").read_text())
    assert saved == {
        "model": "./MODEL",
        "calib": "./data/corpus.txt",
        "samples": 2,
        "seq_len": 64,
        "calib_shards": 1,
        "seed": 7,
        "bits": 4,
        "group_size": 32,
        "no_scale": False,
        "clip": "asymmetric",
        "rounding": "gptq",
        "max_flip_percent": 0.01,
        "knee_tolerance": 0.0,
        "correct_inputs": 0.5,
        "correct_bias": False,
        "component": {"language": "4bit"},
        "keep": ["layers.1.mlp.gate"],
        "lm_head": False,
        "lm_head_chunks": 0,
        "plugin": "tiny",
        "device": "cpu",
        "dtype": "bfloat16",
    }
    awq("quantize", "--recipe", desk / "first" / "recipe.yaml", "--out", "second")
    assert weights(desk / "first") == weights(desk / "second") != {}
    assert (desk / "first" / "recipe.yaml").read_bytes() == (desk / "second" / "recipe.yaml").read_bytes()
    awq("quantize", "--recipe", desk / "first" / "recipe.yaml", "--out", "third", "--seed", 8)
    assert weights(desk / "third") != weights(desk / "first")


@pytest.mark.parametrize(
    "options",
    [["--no-scale"], ["--no-scale", "--clip", "asymmetric"], ["--no-clip"], ["--component", "language=4bit"], []],
    ids=" ".join,
)
def test_flags_round_trip(awq, desk, options):
    words = ["--calib", "corpus.txt", "--samples", 2, "--seq-len", 32, "--group-size", 32]
    awq("quantize", "MODEL", "--out", "first", *words, *options)
    done = awq("quantize", "--recipe", "first/recipe.yaml", "--out", "second", "--json").stdout.splitlines()[-1]
    again = make_again(json.loads(done)["config"])
    assert weights(desk / "first") == weights(desk / "second") != {}
    assert again == read_config(desk / "second" / "recipe.yaml")
    for name in ("recipe.yaml", "README.md", "config.json"):
        assert (desk / "first" / name).read_bytes() == (desk / "second" / name).read_bytes()


def make_again(config):
    return (not config["scale"], config["clip"], config["components"], config["group_size"])


def read_config(path):
    saved = yaml.safe_load(path.read_text())
    return (saved["no_scale"], saved["clip"], saved["component"], saved["group_size"])


def test_every_option_is_saved_or_known_not_to_be(awq, desk):
    awq("quantize", "MODEL", "--out", "q", "--calib", "corpus.txt", "--samples", 1, "--seq-len", 32, "--group-size", 32)
    saved = yaml.safe_load((desk / "q" / "recipe.yaml").read_text())
    assert set(saved) <= set(keys_of(quantize)), "a key that --recipe would refuse"
    left = set(keys_of(quantize)) - set(saved) - CONSENT - GIVEN_ONLY
    assert left <= NOT_SAVED, "an option that the recipe forgets"


def test_no_folder_of_this_machine_is_saved(awq, desk):
    options = ["--samples", 2, "--seq-len", 32, "--group-size", 32]
    awq("quantize", desk / "MODEL", "--out", desk / "q", "--calib", desk / "data" / "corpus.txt", *options)
    text = (desk / "q" / "recipe.yaml").read_text()
    assert str(desk.parent) not in text and desk.name not in text
    saved = yaml.safe_load(text)
    assert (saved["model"], saved["calib"]) == ("./MODEL", "./corpus.txt")


def test_without_calibration_nothing_of_it_is_saved(awq, desk):
    awq("quantize", "MODEL", "--out", "q", "--group-size", 32, "--no-scale", "--calib", "corpus.txt")
    assert not {"calib", "samples", "seq_len"} & set(yaml.safe_load((desk / "q" / "recipe.yaml").read_text()))
