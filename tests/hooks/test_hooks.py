"""The eight hooks, one by one: what the owner answers, what the defaults answer, what is refused.

tests/hooks/test_documented.py fails when a hook has no `test_hook_<name>`.
"""

import types
from collections import UserDict

import pytest

from awq_core.errors import CalibrationError, PluginError
from awq_core.hooks import ComponentPolicy, FusedBlock, KernelBackend, LayerStack, ScaleGroup

LANGUAGE = LayerStack(component="language", blocks="model.layers")
VISION = LayerStack(component="vision", blocks="model.tower.layers")
PROJECTOR = LayerStack(component="projector", blocks="model.projector")
GROUP = ScaleGroup(prev="other_norm", layers=("fc",))


@pytest.fixture
def own(manager, plugin, config):
    """own(architecture, hook=function): register one plugin and return the owner of its model."""

    def make(*architectures, **functions):
        manager.register(plugin("acorn", *architectures, **functions), "acorn", "awq-plugin-acorn", "1.0")
        return manager.owner(config("acorn"))

    return make


def backend(name, **fields):
    return KernelBackend(name=name, formats=("gemm",), devices=("cpu",), factory="acorn:Kernel", **fields)


def test_hook_awq_architectures(manager, plugin, architecture):
    """Collected from every plugin when it is registered, and never asked again."""
    asked = []

    def awq_architectures():
        asked.append(1)
        return [architecture("acorn"), architecture("acorn_moe")]

    info = manager.register(plugin("acorn", awq_architectures=awq_architectures), "acorn")
    manager.register(plugin("birch"), "birch")
    assert info.families == info.model_types == ("acorn", "acorn_moe")
    assert [owner.arch.family for owner in manager.architectures] == ["acorn", "acorn_moe", "birch"]
    assert asked == [1]


def test_hook_awq_architectures_may_be_empty_or_missing(manager, plugin):
    manager.register(plugin("empty", awq_architectures=lambda: []), "empty")
    manager.register(plugin("none", awq_architectures=lambda: None), "none")
    kernels = plugin("kernels", awq_kernel_backends=lambda: [])
    del kernels.awq_architectures
    manager.register(kernels, "kernels")
    assert manager.architectures == ()
    assert manager.plugins[-1].hooks == ("awq_kernel_backends",)


def test_hook_awq_kernel_backends(manager, plugin):
    core = manager.kernel_backends()
    one, two = backend("acorn-fast", priority=5), backend("acorn-slow")
    manager.register(plugin("acorn", awq_kernel_backends=lambda: [one]), "acorn", "awq-plugin-acorn", "1.0")
    manager.register(plugin("birch", awq_kernel_backends=lambda: (two,)), "birch")
    assert manager.kernel_backends() == (*core, one, two)
    with pytest.raises(PluginError) as caught:
        manager.register(plugin("cedar", awq_kernel_backends=lambda: [backend("acorn-fast")]), "cedar")
    assert caught.value.message == (
        "plugin 'cedar' (local) not loaded: "
        "kernel backend 'acorn-fast' is brought by plugin 'acorn' (awq-plugin-acorn 1.0) already"
    )
    assert manager.kernel_backends() == (*core, one, two)
    assert [owner.plugin for owner in manager.architectures] == ["acorn", "birch"]


def test_hook_awq_layer_stacks(manager, own, architecture):
    def awq_layer_stacks(arch, model):
        return [LANGUAGE] if model == "built" else None

    owner = own(architecture("acorn", stacks=(VISION,)), awq_layer_stacks=awq_layer_stacks)
    assert manager.layer_stacks(owner, model="built") == (LANGUAGE,)
    assert manager.layer_stacks(owner, model="other") == (VISION,)  # None: the default answers


def test_hook_awq_scale_groups(manager, own, architecture):
    def awq_scale_groups(index, stack):
        return [GROUP] if index == 1 and stack.component == "language" else None

    owner = own(architecture("acorn"), awq_scale_groups=awq_scale_groups)
    assert manager.scale_groups(owner, LANGUAGE, block=None, index=0) == owner.arch.scale_groups
    assert manager.scale_groups(owner, LANGUAGE, block=None, index=1) == (GROUP,)
    assert manager.scale_groups(owner, VISION, block=None, index=1) == ()


def test_hook_awq_scale_groups_empty_answer_is_an_answer(manager, own):
    """An owner that says "no groups" is not overruled by the default."""
    owner = own(awq_scale_groups=lambda: [])
    assert owner.arch.scale_groups and manager.scale_groups(owner, LANGUAGE, block=None, index=0) == ()


def test_hook_awq_component_policies(manager, own, architecture):
    answer = (ComponentPolicy(component="vision", action="quantize", bits=8),)
    owner = own(
        architecture("acorn", stacks=(VISION, LANGUAGE)),
        awq_component_policies=lambda config: answer if config else None,
    )
    assert manager.component_policies(owner, config={"x": 1}) == answer
    language, vision = manager.component_policies(owner, config=None)
    assert (language.component, language.action) == ("language", "quantize")
    assert (vision.component, vision.action) == ("vision", "keep") and vision.reason


def test_hook_awq_component_policies_default(manager, own, architecture):
    second = LayerStack(component="vision", blocks="model.deep_tower")
    owner = own(architecture("acorn", stacks=(VISION, second, PROJECTOR, LANGUAGE)))
    found = [(one.component, one.action) for one in manager.component_policies(owner, config=None)]
    assert found == [("language", "quantize"), ("vision", "keep"), ("projector", "keep")]


def test_hook_awq_component_policies_declared(manager, own, architecture):
    declared = (ComponentPolicy(component="language", action="keep"),)
    owner = own(architecture("acorn", components=declared))
    assert manager.component_policies(owner, config=None) == declared


def test_hook_awq_fused_blocks(manager, own, architecture):
    declared = (FusedBlock(match="mlp", parts=("gate", "up"), factory="acorn.fused:GateUp"),)
    owner = own(
        architecture("acorn", fused=declared),
        awq_fused_blocks=lambda backend: () if backend == "reference" else None,
    )
    assert manager.fused_blocks(owner, model=None, backend="triton") == declared
    assert manager.fused_blocks(owner, model=None, backend="reference") == ()


def test_hook_awq_prepare_model(manager, own):
    model = types.SimpleNamespace(prepared=False)

    def awq_prepare_model(arch, model):
        if model.prepared:
            return False
        model.prepared = True
        return True

    owner = own(awq_prepare_model=awq_prepare_model)
    assert manager.prepare_model(owner, model) is True and model.prepared
    assert manager.prepare_model(owner, model) is False


def test_hook_awq_prepare_model_has_no_default(manager, own):
    assert manager.prepare_model(own(), model=object()) is False


def test_hook_awq_prepare_model_may_return_none(manager, own):
    assert manager.prepare_model(own(awq_prepare_model=lambda model: None), model=object()) is False


class Tokenizer:
    """Records how it is called; answers as transformers' tokenizers do, with a mapping that is no dict."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text, return_tensors):
        return UserDict(input_ids=f"tokens of {text}", kind=return_tensors)

    def apply_chat_template(self, messages, tokenize, return_dict=False, return_tensors=None):
        if self.chat_template is None:
            raise ValueError("no chat template")
        text = self.chat_template.format(*(message["content"] for message in messages))
        return UserDict(input_ids=f"tokens of {text}", kind=return_tensors) if tokenize else text


class Processor:
    image_token = "<img>"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images, return_tensors):
        return UserDict(input_ids=text, pixel_values=tuple(images), kind=return_tensors)


MESSAGES = [{"role": "user", "content": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}]


@pytest.mark.parametrize(
    ("processor", "sample", "batch"),
    [
        (Tokenizer(), {"text": "abc", "images": []}, {"input_ids": "tokens of abc", "kind": "pt"}),
        (Tokenizer(), {"text": "abc"}, {"input_ids": "tokens of abc", "kind": "pt"}),
        (Tokenizer("[{}]"), {"messages": MESSAGES}, {"input_ids": "tokens of [hello]", "kind": "pt"}),
        (Tokenizer(), {"messages": MESSAGES}, {"input_ids": "tokens of hello", "kind": "pt"}),
        (Tokenizer(), {"messages": PARTS}, {"input_ids": "tokens of see", "kind": "pt"}),
        (Processor(Tokenizer()), {"text": "abc"}, {"input_ids": "tokens of abc", "kind": "pt"}),
        (Processor(Tokenizer("[{}]")), {"messages": MESSAGES}, {"input_ids": "tokens of [hello]", "kind": "pt"}),
        (
            Processor(Tokenizer()),
            {"text": "abc", "images": ["A", "B"]},
            {"input_ids": "<img><img>abc", "pixel_values": ("A", "B"), "kind": "pt"},
        ),
        (
            Processor(Tokenizer()),
            {"text": "a <img> b", "images": ["A"]},
            {"input_ids": "a <img> b", "pixel_values": ("A",), "kind": "pt"},
        ),
        (
            Processor(Tokenizer("<img>[{}]")),
            {"messages": MESSAGES, "images": ["A"]},
            {"input_ids": "<img>[hello]", "pixel_values": ("A",), "kind": "pt"},
        ),
    ],
)
def test_hook_awq_calibration_batch_default(manager, own, processor, sample, batch):
    found = manager.calibration_batch(own(), processor, sample)
    assert found == batch and type(found) is dict


def test_hook_awq_calibration_batch(manager, own):
    owner = own(awq_calibration_batch=lambda sample: {"pixel_values": sample["images"]} if sample["images"] else None)
    assert manager.calibration_batch(owner, Tokenizer(), {"text": "x", "images": [1]}) == {"pixel_values": [1]}
    found = manager.calibration_batch(owner, Tokenizer(), {"text": "x", "images": []})
    assert found == {"input_ids": "tokens of x", "kind": "pt"}


def test_hook_awq_calibration_batch_of_an_unknown_sample(manager, own):
    with pytest.raises(CalibrationError, match="neither text nor messages, only prompt"):
        manager.calibration_batch(own(), Tokenizer(), {"prompt": "x"})


def test_default_batch_with_a_transformers_tokenizer(manager, own):
    """The two cases above that depend on transformers' own behaviour: a template set, and none."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "[U]": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    owner = own()
    for sample in ({"text": "hello hello"}, {"messages": [*MESSAGES, *MESSAGES]}):
        assert manager.calibration_batch(owner, tokenizer, sample)["input_ids"].tolist() == [[0, 0]]
    tokenizer.chat_template = "{% for m in messages %}[U] {{ m['content'] }} {% endfor %}"
    batch = manager.calibration_batch(owner, tokenizer, {"messages": [*MESSAGES, *MESSAGES]})
    assert batch["input_ids"].tolist() == [[1, 0, 1, 0]]


# -- what is refused, for each hook alike

CALLS = {
    "awq_layer_stacks": lambda manager, owner: manager.layer_stacks(owner, None),
    "awq_scale_groups": lambda manager, owner: manager.scale_groups(owner, LANGUAGE, None, 0),
    "awq_component_policies": lambda manager, owner: manager.component_policies(owner, None),
    "awq_fused_blocks": lambda manager, owner: manager.fused_blocks(owner, None, "reference"),
    "awq_calibration_batch": lambda manager, owner: manager.calibration_batch(owner, Tokenizer(), {"text": "x"}),
    "awq_prepare_model": lambda manager, owner: manager.prepare_model(owner, None),
}


@pytest.mark.parametrize("hook", CALLS)
@pytest.mark.parametrize("answer", [3, "text", [3], object()])
def test_wrong_answers_name_plugin_and_hook(manager, own, hook, answer):
    with pytest.raises(PluginError) as caught:
        CALLS[hook](manager, own(**{hook: lambda: answer}))
    assert caught.value.message.startswith(f"plugin 'acorn' (awq-plugin-acorn 1.0): {hook} returned ")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("hook", CALLS)
def test_exceptions_name_plugin_and_hook(manager, own, hook):
    def fail():
        raise KeyError("q_proj")

    with pytest.raises(PluginError) as caught:
        CALLS[hook](manager, own(**{hook: fail}))
    assert caught.value.message == f"plugin 'acorn' (awq-plugin-acorn 1.0): {hook} raised KeyError: 'q_proj'"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("hook", CALLS)
def test_errors_of_the_toolkit_pass_unchanged(manager, own, hook):
    error = CalibrationError("no image in the sample", hint="add one")

    def fail():
        raise error

    with pytest.raises(CalibrationError) as caught:
        CALLS[hook](manager, own(**{hook: fail}))
    assert caught.value is error


@pytest.mark.parametrize("hook", CALLS)
def test_exit_in_a_hook_is_an_error(manager, own, hook):
    def fail():
        raise SystemExit(0)

    with pytest.raises(PluginError, match="raised SystemExit: 0"):
        CALLS[hook](manager, own(**{hook: fail}))


def test_failure_of_a_default_is_not_blamed_on_the_plugin(manager, own):
    with pytest.raises(PluginError, match=r"^plugin 'awq-core defaults' \(awq-core 0.1.0\): awq_calibration_batch"):
        manager.calibration_batch(own(), object(), {"text": "x"})
