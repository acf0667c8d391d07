"""`device_map`: which device each part goes to, and that a model in several places is the same model."""

import builtins
import sys

import pytest
import torch

from awq_core.errors import ConfigError
from awq_core.runtime import placement
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load
from awq_core.runtime.placement import Places, place
from awq_core.skeleton import build_skeleton

IDS = torch.randint(8, 100, (2, 11), generator=torch.Generator().manual_seed(0))
SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip


@pytest.fixture
def skeleton(llama_config):
    return build_skeleton(llama_config())


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with GPUs 0 and 1, as far as names go."""
    monkeypatch.setattr(placement, "pick_device", torch.device)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# -- where parts go ---------------------------------------------------------------------------------------------------


def test_the_longest_path_decides():
    zero, one, two = (torch.device("cuda", number) for number in range(3))
    places = Places({"": zero, "model.layers.1": one, "model.layers.1.mlp": two})
    assert places("model.layers.1.self_attn.q_proj.weight") == one
    assert places("model.layers.1.mlp.up_proj") == two
    assert places("model.layers.10.mlp.up_proj") == zero
    assert places("lm_head") == zero


def test_what_is_left_out_is_named():
    with pytest.raises(ConfigError, match="leaves parts"):
        Places({"model": torch.device("cpu")})("lm_head.weight")


def test_numbers_are_gpus(skeleton, two_gpus):
    pytest.importorskip("accelerate")
    places = place(skeleton, "cpu", {"": 0, "model.layers.1": 1})
    assert places("model.layers.1.mlp") == torch.device("cuda:1") and places("lm_head") == torch.device("cuda:0")
    assert place(skeleton, "cpu", 1)("lm_head") == torch.device("cuda:1")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_one_device_needs_no_accelerate(skeleton, monkeypatch, device_map):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert place(skeleton, "cpu", device_map).devices == {"": torch.device("cpu")}


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"model": "cpu"}, ("leaves lm_head.weight out", '"": for the rest')),
        ({"": "cpu", "model.layer.0": "cpu"}, ("'model.layer.0'",)),
        ({"": "cuda:0", "lm_head": "cpu"}, ("GPUs", "nothing is offloaded")),
    ],
)
def test_maps_that_do_not_fit(skeleton, two_gpus, device_map, words, one_line):
    with pytest.raises(ConfigError) as caught:
        place(skeleton, "cpu", device_map)
    one_line(caught.value, *words)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "toaster"}, "toaster", {"": "meta"}])
def test_devices_that_are_not_there(skeleton, device_map, one_line):
    with pytest.raises(ConfigError) as caught:
        place(skeleton, "cpu", device_map)
    one_line(caught.value, "device=")


def test_a_device_and_a_map(quantized_llama, one_line):
    with pytest.raises(ConfigError) as caught:
        load(quantized_llama, device="auto", device_map="auto")
    one_line(caught.value, "device='auto'", "device_map")


@pytest.mark.parametrize("device_map", ["auto", SPLIT])
def test_without_accelerate(quantized_llama, monkeypatch, device_map, one_line):
    importing = builtins.__import__

    def missing(name, *rest):
        if name.partition(".")[0] == "accelerate":
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError) as caught:
        load(quantized_llama, device_map=device_map)
    one_line(caught.value, "needs accelerate", "awq-core[accelerate]")


# -- "auto" -----------------------------------------------------------------------------------------------------------


def gpus(monkeypatch, *sizes):
    """Tell accelerate of GPUs with so many bytes."""
    utils = pytest.importorskip("accelerate.utils.modeling")
    memory = dict(enumerate(sizes)) | {"cpu": 1 << 40}
    monkeypatch.setattr(utils, "get_max_memory", lambda given=None: given or dict(memory))
    monkeypatch.setattr(utils, "is_xpu_available", lambda *_, **__: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_four_bits_count_as_four_bits(llama_config, two_gpus, monkeypatch):
    """A model that fits the GPU only because its linears are small is put there whole."""
    skeleton = build_skeleton(llama_config(hidden_size=256, intermediate_size=512), dtype=torch.float16)
    packed = [path for path, one in skeleton.named_modules() if isinstance(one, torch.nn.Linear) and "layers" in path]
    whole = sum(parameter.nbytes for parameter in skeleton.parameters())
    gpus(monkeypatch, whole // 2)
    assert place(skeleton, "cpu", "sequential", packed).devices == {"": torch.device("cuda:0")}
    with pytest.raises(ConfigError, match="does not fit"):
        place(skeleton, "cpu", "sequential")


def test_two_gpus_share(llama_config, two_gpus, monkeypatch):
    skeleton = build_skeleton(llama_config(num_hidden_layers=8), dtype=torch.float16)
    whole = sum(parameter.nbytes for parameter in skeleton.parameters())
    gpus(monkeypatch, whole, whole)
    places = place(skeleton, "cpu", "auto")
    blocks = [places(f"model.layers.{number}").index for number in range(8)]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1}
    for number in range(8):
        assert {places(name) for name in (f"model.layers.{number}.mlp.up_proj", f"model.layers.{number}")} == {
            torch.device("cuda", blocks[number])
        }


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, SPLIT, {"model": "cpu", "lm_head": "cpu"}])
@pytest.mark.parametrize("fuse", [False, True])
def test_it_is_the_same_model(quantized_llama, device_map, fuse):
    pytest.importorskip("accelerate")
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("would be the GPU")
    want = load(quantized_llama, fuse=fuse)
    model = load(quantized_llama, device_map=device_map, fuse=fuse)
    assert torch.equal(logits(model), logits(want))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), want.generate(input_ids=IDS, **options))
    hooked = [path for path, module in model.named_modules() if hasattr(module, "_hf_hook")]
    assert bool(hooked) == (isinstance(device_map, dict) and len(device_map) > 1)


def test_tied_weights_in_several_places(tmp_path, llama_config):
    from awq_core.testing import save_tiny

    pytest.importorskip("accelerate")
    save_tiny(llama_config(tie_word_embeddings=True), tmp_path)
    model = load(tmp_path, device_map=SPLIT)
    assert torch.equal(logits(model), logits(load(tmp_path)))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus(quantized_llama):
    split = {path: int(path in ("model.layers.1", "model.norm", "lm_head")) for path in SPLIT}
    model = load(quantized_llama, dtype="bfloat16", device_map=split)
    linears = [one for one in model.model.layers[1].modules() if isinstance(one, QuantLinear)]
    assert {buffer.device.index for one in linears for buffer in one.buffers()} == {1}
    with torch.no_grad():
        want = load(quantized_llama, dtype="bfloat16", device="cuda")(IDS.cuda()).logits
        assert torch.equal(model(IDS.cuda()).logits.cpu(), want.cpu())
