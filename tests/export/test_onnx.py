"""ONNX: every product equal to torch's, and the whole decoder in ONNX Runtime, token by token."""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import awq_core
from awq_core.checkpoint.pack import dequantize, pack_linear
from awq_core.errors import CheckpointError, ConfigError
from awq_core.export.formats import export_checkpoint
from awq_core.export.onnx_linear import MatMulNBits, block_size
from awq_core.export.source import open_source

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
PROMPTS = ("def read_json(path):\n", "class Stack:\n    def __init__(self, items")
NEW = 24


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def packed_linear(rows, out, group, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (out, rows), generator=generator)
    zeros = torch.randint(0, 16, (out, rows // group), generator=generator)
    return pack_linear(codes, torch.rand(out, rows // group, generator=generator) + 0.01, zeros, dtype)


@pytest.mark.parametrize(
    ("rows", "group", "block"),
    [(96, 32, 32), (128, 64, 64), (384, 128, 128), (192, 96, 32), (80, 80, 16), (256, 256, 128), (48, 16, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_is_torchs(rows, group, block, dtype):
    """One node in ONNX Runtime, with one block, odd numbers of blocks, and groups of several blocks."""
    packed = packed_linear(rows, 24, group, dtype)
    module = MatMulNBits("a", packed, None, torch.float32)
    assert module.block == block
    held = {name: getattr(module, name).numpy() for name in ("weight", "scales", "zero_points")}
    attributes = {"K": rows, "N": 24, "bits": 4, "block_size": block, "accuracy_level": 1}
    node = onnx.helper.make_node("MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", **attributes)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [3, rows])],
        [value("y", onnx.TensorProto.FLOAT, [3, 24])],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = torch.randn(3, rows, generator=torch.Generator().manual_seed(1))
    (y,) = session(model.SerializeToString()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), x @ dequantize(packed).T, rtol=1e-4, atol=1e-4)


def test_groups_that_make_no_blocks(one_line):
    with pytest.raises(CheckpointError) as caught:
        block_size("layers.0.q", 40)
    one_line(caught.value, "layers.0.q", "40", "--group-size")


@pytest.fixture(scope="module")
def exported(quantized_pycoder, tmp_path_factory):
    return export_checkpoint(quantized_pycoder, tmp_path_factory.mktemp("onnx") / "x", "onnx").out


def greedy(path, rows, new):
    """Continuations of prompts of any lengths, padded on the left: the first step has no past, the others one token."""
    run = session(path)
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    past = {
        one.name: np.zeros((len(rows), one.shape[1], 0, one.shape[3]), np.float32)
        for one in run.get_inputs()
        if one.name.startswith("past_key_values.")
    }
    found = []
    for _ in range(new):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = run.run(None, {one.name: feed[one.name] for one in run.get_inputs()})
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        found.append(ids)
    return np.concatenate(found, 1).tolist()


def continuation(model, row):
    """Greedy tokens of the torch model, which reads the whole text again for each."""
    ids = torch.tensor([row])
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(row) :].tolist()


def test_the_same_greedy_tokens(quantized_pycoder, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    rows = [tokenizer(text).input_ids for text in PROMPTS]
    assert len(rows[0]) != len(rows[1])
    model = awq_core.load(quantized_pycoder, dtype="float32")
    expected = [continuation(model, row) for row in rows]
    assert greedy(exported / "model.onnx", rows, NEW) == expected
    assert greedy(exported / "model.onnx", rows[:1], NEW) == expected[:1]


def test_names_and_shapes(exported):
    run = session(exported / "model.onnx")
    inputs = {one.name: one.shape for one in run.get_inputs()}
    assert inputs["input_ids"] == ["batch", "tokens"]
    assert inputs["past_key_values.5.value"] == ["batch", 2, "past", 64]
    assert {one.name for one in run.get_outputs()} == {
        "logits",
        *(f"present.{layer}.{kind}" for layer in range(6) for kind in ("key", "value")),
    }


def test_the_file_is_no_larger(quantized_pycoder, exported):
    """Weights lie in a file of their own, in no more bits than before; scales and the embedding stay in 16."""
    before = (quantized_pycoder / "model.safetensors").stat().st_size
    assert (exported / "model.onnx.data").stat().st_size < 1.01 * before
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    assert sum(tensor.ByteSize() for tensor in graph.initializer) < 1e5
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 42 and all(node.domain == "com.microsoft" for node in nodes)
    wide = [one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT and np.prod(one.dims) > 256]
    assert not wide
    assert not any(node.metadata_props for node in graph.node)


def test_codes_and_scales_are_the_checkpoints(quantized_pycoder, exported):
    """Read by the onnx package and decoded here, against this project's own decoder."""
    graph = onnx.load(exported / "model.onnx").graph
    held = {one.name: one for one in graph.initializer}
    with open_source(quantized_pycoder) as source:
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.5.mlp.down_proj"):
            read = {
                part: onnx.numpy_helper.to_array(held[f"model.{name}.{part}"])
                for part in ("weight", "scales", "zero_points")
            }
            # The first of two neighbours is in the lower half of a byte.
            weight, zeros = (np.stack([read[part] % 16, read[part] // 16], -1) for part in ("weight", "zero_points"))
            scales = read["scales"].astype(np.float32)
            out, blocks = scales.shape
            zeros = zeros.reshape(out, -1)[:, :blocks, None]
            found = (weight.reshape(out, blocks, -1).astype(np.float32) - zeros) * scales[..., None]
            expected = dequantize(source.linear(name)).numpy()
            np.testing.assert_array_equal(found.reshape(out, -1), expected)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package(quantized_llama, tmp_path, monkeypatch, one_line, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(quantized_llama, tmp_path / "x", "onnx")
    one_line(caught.value, package, "awq-core[onnx]")
    assert not (tmp_path / "x").exists()


def quantized(config, folder):
    from awq_core.testing import save_tiny

    save_tiny(config, folder / "source")
    awq_core.quantize(
        folder / "source", folder / "DIR", config=awq_core.QuantConfig(group_size=32, scale=False, clip="none")
    )
    return folder / "DIR"


def mixtures(tiny_options):
    from transformers import MixtralConfig, Qwen2MoeConfig

    shared = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 3}
    yield MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2), 4
    yield Qwen2MoeConfig(**tiny_options, **shared, num_experts_per_tok=1), 3


@pytest.mark.parametrize("number", range(2))
def test_a_mixture_runs_the_experts_that_were_chosen(tmp_path, tiny_options, number):
    """Its tokens are torch's, alone and in a padded batch, and every expert stands in a branch."""
    config, experts = list(mixtures({**tiny_options, "num_hidden_layers": 1}))[number]
    folder = quantized(config, tmp_path)
    made = export_checkpoint(folder, tmp_path / "x", "onnx").out
    model, rows = awq_core.load(folder, dtype="float32"), [list(range(10, 22)), [7, 90, 33]]
    expected = [continuation(model, row) for row in rows]
    assert greedy(made / "model.onnx", rows, NEW) == expected
    assert greedy(made / "model.onnx", rows[1:], NEW) == expected[1:]

    graph = onnx.load(made / "model.onnx", load_external_data=False).graph
    branches = [node for node in graph.node if node.op_type == "If"]
    assert len(branches) == experts
    for node in branches:
        then, otherwise = ({one.name: one.g for one in node.attribute}[f"{name}_branch"] for name in ("then", "else"))
        assert [one.op_type for one in then.node].count("MatMulNBits") == 3
        assert "MatMulNBits" not in [one.op_type for one in otherwise.node]
        assert not any(one.metadata_props for one in (*then.node, *otherwise.node))


def test_what_torch_cannot_trace_is_refused(quantized_llama, tmp_path, monkeypatch, one_line):
    def fails(*_, **__):
        raise RuntimeError("a long story") from ValueError("\nData-dependent\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(quantized_llama, tmp_path / "x", "onnx")
    one_line(caught.value, "llama", "Data-dependent")
    assert not (tmp_path / "x").exists()


def test_fused_qkv_biases_and_a_window(tmp_path, tiny_options):
    """Another family: fused q/k/v, partial rotary embedding, layer norms with biases; past its window."""
    from transformers import Phi3Config, PhiConfig

    one_layer = {**tiny_options, "num_hidden_layers": 1, "pad_token_id": 0}
    for number, config in enumerate((PhiConfig(**one_layer), Phi3Config(**one_layer, sliding_window=8))):
        folder = quantized(config, tmp_path / str(number))
        made = export_checkpoint(folder, tmp_path / str(number) / "x", "onnx").out
        model, row = awq_core.load(folder, dtype="float32"), list(range(10, 22))
        assert greedy(made / "model.onnx", [row], NEW) == [continuation(model, row)]
