"""benchmarks/quantize.py: each toolkit's files are read right, the model it makes computes what the example does.

The references are written here from the layouts' descriptions, number by number; what the benchmark must read is not
made with its own code.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OUT, IN, GROUP = 16, 64, 32


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def linear():
    """Codes [out, in], zero points and scales [out, groups], and the weight they stand for."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT, IN), generator=generator)
    zeros = torch.randint(0, 16, (OUT, IN // GROUP), generator=generator)
    scales = torch.rand(OUT, IN // GROUP, generator=generator).half() + 0.01
    weight = torch.empty(OUT, IN)
    for row in range(OUT):
        for column in range(IN):
            group = column // GROUP
            weight[row, column] = (codes[row, column] - zeros[row, group]) * scales[row, group].float()
    return codes, zeros, scales, weight


def words(rows: list[list[int]]) -> torch.Tensor:
    """int32 words, each given as its eight nibbles from the low end."""
    signed = []
    for row in rows:
        eights = [row[start : start + 8] for start in range(0, len(row), 8)]
        values = [sum(nibble << 4 * place for place, nibble in enumerate(eight)) for eight in eights]
        signed.append([value - 2**32 if value >= 2**31 else value for value in values])
    return torch.tensor(signed, dtype=torch.int32)


def read_back(folder: Path, tensors: dict[str, torch.Tensor], **settings: str) -> dict[str, torch.Tensor]:
    from peers.layouts import plain_weights

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return plain_weights(folder)


def test_awq_as_this_project_packs_it(tmp_path, linear):
    from awq_core.checkpoint.pack import pack_linear

    codes, zeros, scales, weight = linear
    packed = pack_linear(codes, scales, zeros)
    found = read_back(
        tmp_path, {"p.qweight": packed.qweight, "p.qzeros": packed.qzeros, "p.scales": packed.scales, "n": weight}
    )
    assert set(found) == {"p.weight", "n"}
    torch.testing.assert_close(found["p.weight"], weight, rtol=0, atol=0)


@pytest.mark.parametrize(("version", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_with_and_without_zero_points_less_one(tmp_path, linear, version, less):
    codes, zeros, scales, weight = linear
    tensors = {
        "p.qweight": words(codes.tolist()).t(),
        "p.qzeros": words(((zeros.t() - less) % 16).tolist()),
        "p.scales": scales.t(),
        "p.g_idx": torch.arange(IN, dtype=torch.int32) // GROUP,
    }
    found = read_back(tmp_path, tensors, quant_method="gptq", checkpoint_format=version)
    torch.testing.assert_close(found["p.weight"], weight, rtol=0, atol=0)


def test_gptq_with_channels_in_another_order(tmp_path, linear):
    codes, zeros, scales, _ = linear
    group = torch.randint(0, IN // GROUP, (IN,), generator=torch.Generator().manual_seed(1))
    tensors = {
        "p.qweight": words(codes.tolist()).t(),
        "p.qzeros": words(zeros.t().tolist()),
        "p.scales": scales.t(),
        "p.g_idx": group.int(),
    }
    found = read_back(tmp_path, tensors, checkpoint_format="gptq_v2")["p.weight"]
    for row, column in ((0, 0), (3, 17), (OUT - 1, IN - 1)):
        zero, scale = zeros[row, group[column]], scales[row, group[column]].float()
        assert found[row, column] == (codes[row, column] - zero) * scale


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors(tmp_path, linear, symmetric):
    codes, zeros, scales, _ = linear
    # On disk every signed number has 8 added; a symmetric linear has no zero points: its zero is the signed 0.
    tensors = {
        "p.weight_packed": words(codes.tolist()),
        "p.weight_scale": scales,
        "p.weight_shape": torch.tensor([OUT, IN]),
    }
    if symmetric:
        zeros = torch.full_like(zeros, 8)
    else:
        tensors["p.weight_zero_point"] = words(zeros.t().tolist()).t()
    found = read_back(tmp_path, tensors)["p.weight"]
    for row, column in ((0, 0), (5, 40), (OUT - 1, IN - 1)):
        group = column // GROUP
        signed, zero = int(codes[row, column]) - 8, int(zeros[row, group]) - 8
        assert found[row, column] == (signed - zero) * scales[row, group].float()


def test_model_optimizer_with_what_no_norm_absorbed(tmp_path, linear):
    codes, _, scales, _ = linear
    inputs = torch.rand(IN) + 0.5
    stored = torch.zeros(OUT // 2, IN, dtype=torch.uint8)
    for row in range(OUT):
        for column in range(IN):
            stored[row // 2, column] += int(codes[row, column]) << (4 * (row % 2))
    tensors = {"p.weight": stored, "p.weight_scale": scales, "p.pre_quant_scale": inputs}
    found = read_back(tmp_path, tensors)
    for row, column in ((0, 0), (5, 40), (OUT - 1, IN - 1)):
        code = int(codes[row, column])
        signed = code - 16 if code > 7 else code
        expected = signed * scales[row, column // GROUP].float() * inputs[column]
        torch.testing.assert_close(found["p.weight"][row, column], expected)


def test_widening_keeps_the_function(llama_config):
    from peers.prepare import widen
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    narrow = LlamaForCausalLM(llama_config(tie_word_embeddings=True, initializer_range=0.2)).eval()
    weights = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    settings = narrow.config.to_dict()
    widen(weights, settings, 3)
    wide = LlamaForCausalLM(type(narrow.config)(**settings)).eval()
    wide.load_state_dict(weights)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, narrow(ids).logits, rtol=1e-3, atol=1e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    narrow_size, wide_size = (float(state[name].std()) for state in (narrow.state_dict(), weights))
    assert wide_size == pytest.approx(narrow_size / 3**0.5, rel=0.1), (
        "each weight has the size that a wide model's have"
    )
    assert len(weights[name].unique()) > 0.99 * weights[name].numel(), "hardly two weights are alike"


def test_a_run_over_its_time_is_stopped_and_others_are_accounted(tmp_path):
    from peers.process import watch

    def python(code: str, limit: float | None):
        return watch([sys.executable, "-c", code], folder=tmp_path, environment={}, log=tmp_path / "log", limit=limit)

    started = time.perf_counter()
    assert python("import time; time.sleep(60)", 0.3).code is None
    assert time.perf_counter() - started < 5
    used = python("x = bytearray(200_000_000); print('done')", None)
    assert used.code == 0 and used.peak_bytes > 2e8
    assert (tmp_path / "log").read_text() == "done\n"
    assert python("raise SystemExit(3)", None).code == 3


def test_the_table_counts_against_our_whole_run(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_quantize", BENCHMARKS / "quantize.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = [
        {"name": "awq_core", "settings": "AWQ", "quantize": 10.0, "total": 10.0, "perplexity": 11.0, "kl": 0.01},
        {"name": "autoawq", "settings": "AWQ", "quantize": 125.0, "total": 130.0},
        {"name": "llmcompressor", "settings": "AWQ", "quantize": 1800, "stopped": True},
        {"name": "modelopt", "settings": "awq_lite", "failed": "ImportError: x", "quantize": 3.0},
    ]
    header, *lines = bench.table(rows)
    at = {title: header.index(title) for title in header}
    assert [line[at["ratio"]] for line in lines] == ["1.0", "12.5", ">180.0", ""]
    assert [line[at["quantize s"]] for line in lines] == ["10.0", "125.0", ">1800.0", "failed"]
    assert lines[0][at["KL"]] == "0.01000"
    assert bench.markdown([header, *lines]).count("\n") == len(lines) + 1


def test_help_needs_no_torch():
    script = str(BENCHMARKS / "quantize.py")
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = [{script!r}, '--help']; "
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    for word in ("autoawq:no-clip", "--budget-minutes", "One after the other"):
        assert word in done.stdout


def test_a_toolkit_does_not_import_our_scripts(tmp_path):
    """transformers imports a package named `kernels` where it finds one; benchmarks/kernels.py is none."""
    from peers.running import child_environment, module_command

    python, flag, code, *_ = module_command(sys.executable, "process", tmp_path / "job.json")
    code += "\nimport importlib.util\nprint(importlib.util.find_spec('kernels'), 'peers.job' in sys.modules)"
    code = code.replace("peers.process", "peers.running")  # which imports others of its package
    done = subprocess.run(
        [python, flag, code], cwd=tmp_path, env=child_environment(1), stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.split() == ["None", "True"]
