"""How much memory loading takes, as the kernel counts it for a process that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from awq_core.checkpoint.format import quantization_config
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import NumericsError
from awq_core.runtime.load import HOLES

MIB = 1 << 20
WIDTH, LAYERS, GROUP, VOCABULARY = 1024, 12, 128, 32000
CHILD = """
import json, sys
import torch
from awq_core.devices import peak_bytes, release_freed_memory, reset_peak, resident_bytes
from awq_core.runtime.load import load
cpu = torch.device("cpu")
load(sys.argv[2], dtype="bfloat16")  # what is imported, compiled and cached at the first use
release_freed_memory()
reset_peak(cpu)
start = resident_bytes()
model = load(sys.argv[1], dtype="bfloat16")
held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(json.dumps({"peak": peak_bytes(cpu) - start, "end": resident_bytes() - start, "held": held}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_config):
    """A model of about 170 MB, a third of it in one fp16 tensor that is loaded as bf16."""
    path = tmp_path_factory.mktemp("memory")
    sizes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
             "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, 4 * WIDTH), "mlp.up_proj": (WIDTH, 4 * WIDTH),
             "mlp.down_proj": (4 * WIDTH, WIDTH)}  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": torch.full((VOCABULARY, WIDTH), 0.01).half(),
        "model.norm.weight": torch.ones(WIDTH).half(),
    }
    for layer in range(LAYERS):
        for name, (inputs, outputs) in sizes.items():
            base = f"model.layers.{layer}.{name}"
            tensors[f"{base}.qweight"] = torch.full((inputs, outputs // 8), 0x12345678, dtype=torch.int32)
            tensors[f"{base}.qzeros"] = torch.zeros(inputs // GROUP, outputs // 8, dtype=torch.int32)
            tensors[f"{base}.scales"] = torch.full((inputs // GROUP, outputs), 0.01).half()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(WIDTH).half()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = llama_config(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=VOCABULARY, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        quantization_config=quantization_config(group_size=GROUP, modules_to_not_convert=["lm_head"]),
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the most a process ever had")
@pytest.mark.parametrize("backend", ["", "int4pack"])
def test_there_is_never_a_second_copy(folder, quantized_llama, monkeypatch, backend):
    if backend:
        monkeypatch.setenv("AWQ_KERNEL", backend)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(quantized_llama)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    packed = (folder / "model.safetensors").stat().st_size
    assert 0.9 * packed < found["held"] < 1.1 * packed
    # Parts of one tensor, and what is freed and not yet given back, however large the model; a second copy is 170 MB.
    assert found["peak"] < packed + HOLES + 64 * MIB
    assert found["end"] < found["held"] + 32 * MIB


# -- reading into memory that is there --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (7,), (1000, 513), (3, 5, 7), (1, 1 << 15)])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.int32])
def test_read_into_is_reading(tmp_path, monkeypatch, shape, stored):
    from awq_core.checkpoint import reader as module

    monkeypatch.setattr(module, "_CHUNK", 1 << 12)  # many parts
    tensor = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(stored)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for wanted in {stored, torch.bfloat16} if stored.is_floating_point else {stored}:
            out = torch.full(shape, 7, dtype=wanted)
            assert reader.read_into("x", out) is out
            assert torch.equal(out, tensor.to(wanted))
        turned = torch.empty(shape[::-1], dtype=stored).permute(tuple(reversed(range(len(shape)))))
        assert torch.equal(reader.read_into("x", turned), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_read_into_looks_at_every_number(tmp_path, dtype, one_line):
    tensor = torch.zeros(100, 10)
    tensor[99, 9] = 1e30 if dtype is torch.float16 else torch.nan
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(NumericsError) as caught:
        reader.read_into("x", torch.empty(100, 10, dtype=dtype))
    one_line(caught.value, "x", "overflows" if dtype is torch.float16 else "NaN or inf")
