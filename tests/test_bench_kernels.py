"""benchmarks/kernels.py and decode.py: right products are compared, what is missing says so, shapes are the models'."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import awq_core
from awq_core.checkpoint.pack import dequantize, pack
from awq_core.runtime.linear import QuantLinear

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def problem():
    """Codes and zero points of every value; 3 groups of 8 inputs, an odd number of them."""
    from kernel_peers import Problem

    draw = np.random.default_rng(0)
    codes, zeros = (draw.integers(0, 16, (16, count), dtype=np.uint8) for count in (24, 3))
    return Problem(codes, zeros, draw.random((16, 3), np.float32).astype(np.float16).astype(np.float32))


def test_the_weight_of_a_problem(problem):
    for row, column in ((0, 0), (5, 7), (5, 8), (15, 23)):
        group = column // 8
        value = (int(problem.codes[row, column]) - int(problem.zeros[row, group])) * problem.scales[row, group]
        assert problem.weight[row, column] == value


def test_two_codes_to_a_byte(problem):
    from kernel_peers import halves

    packed = halves(problem.zeros)
    assert packed.shape == (16, 2)
    for row in range(16):
        nibbles = [half for byte in packed[row].tolist() for half in (byte & 15, byte >> 4)]
        assert nibbles == [*problem.zeros[row].tolist(), 0]


def test_words_are_this_projects(problem):
    from kernel_peers import awq_words

    assert torch.equal(torch.from_numpy(awq_words(problem.codes.T)), pack(torch.from_numpy(problem.codes.T.copy())))


def test_a_problem_is_what_our_kernels_get():
    from kernels import packed_at_random, problem_of

    packed = packed_at_random(256, 64, 3)
    assert np.array_equal(problem_of(packed).weight, dequantize(packed, torch.float32).numpy())


def test_a_peer_that_is_not_installed_says_so(problem, tmp_path, monkeypatch):
    from kernel_worker import Missing, Worker

    # Found before the real one, where that is installed.
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    pytest.importorskip("numpy")
    np.savez(tmp_path / "problem.npz", codes=problem.codes, zeros=problem.zeros, scales=problem.scales)
    worker = Worker(Path(sys.executable), "llama.cpp-q4_k", 1)
    try:
        for _ in range(2):  # and goes on answering
            with pytest.raises(Missing, match=r"^not installed: No module named 'llama_cpp'"):
                worker.ask(problem=str(tmp_path / "problem.npz"), copies=1)
    finally:
        worker.close()
    with pytest.raises(Missing, match="it stopped"):
        dead = Worker(Path(sys.executable), "no-such-peer", 1)
        dead.process.wait()
        dead.ask(turn=0)


def test_every_peer_has_an_environment():
    from kernel_peers import PEERS
    from peers.environments import REQUIREMENTS

    assert {peer.environment for peer in PEERS.values()} <= set(REQUIREMENTS)


def test_kernels_are_compared_on_the_same_weights():
    from kernels import measure

    absent: dict[str, str] = {}
    settings = {"rounds": 2, "spread": 1, "dtype": torch.bfloat16, "device": "cpu", "workers": {}, "absent": absent}
    lines = measure(256, 64, [1, 3], **settings, chosen=("reference", "int4pack", "triton"))
    names = [line["kernel"] for line in lines]
    assert set(names) == {"linear", "reference", "int4pack"} and list(absent) == ["triton"]
    assert {line["rows"] for line in lines} == {1, 3} and len(names) == 2 * len(set(names))
    for line in lines:
        assert line["ms"] > 0 and line["bytes"] > 0
        assert (line["error"] is None) == (line["kernel"] == "linear")
        assert line["kernel"] == "linear" or line["error"] < 0.02
        assert line["kernel"] != "linear" or line["times_linear"] == 1


def test_a_wrong_product_shows():
    from kernels import Ours, error_of, packed_at_random, problem_of

    packed = packed_at_random(256, 64, 3)
    weight = dequantize(packed, torch.float32)
    errors = [
        error_of(Ours([lambda x, w=one: x @ w.T], 1, "cpu"), problem_of(packed), torch.float32, "cpu")
        for one in (weight, weight.roll(1, 0))
    ]
    assert errors[0] < 1e-5 and errors[1] > 0.1


def test_shapes_are_those_of_the_models():
    """The linears of transformers' models, q, k, v and gate, up put together."""
    from kernels import MODELS
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    published = {
        "llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
        "llama-3-8b": LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
        ),
        "llama-3-70b": LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8
        ),
        "qwen-2.5-7b": Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
        ),
        "qwen-2.5-32b": Qwen2Config(
            hidden_size=5120, intermediate_size=27648, num_attention_heads=40, num_key_value_heads=8
        ),
    }
    assert set(published) == set(MODELS)
    for name, config in published.items():
        config.num_hidden_layers = 1
        with torch.device("meta"):
            block = AutoModelForCausalLM.from_config(config).model.layers[0]
        q, k, v, o = (getattr(block.self_attn, f"{one}_proj") for one in "qkvo")
        gate, up, down = (getattr(block.mlp, f"{one}_proj") for one in ("gate", "up", "down"))
        assert MODELS[name] == {
            "qkv": (q.in_features, q.out_features + k.out_features + v.out_features),
            "o": (o.in_features, o.out_features),
            "gate-up": (gate.in_features, gate.out_features + up.out_features),
            "down": (down.in_features, down.out_features),
        }


def test_the_checkpoints_of_the_decode_benchmark(tmp_path, monkeypatch):
    import decode

    from awq_core.checkpoint.format import quantization_config

    tiny = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(decode.MODELS, "tiny", {**tiny, "num_hidden_layers": 8, "vocab_size": 8192})
    config = decode.cut("tiny", 2)
    assert (config.num_hidden_layers, config.vocab_size) == (2, 2048), "the head keeps its share"
    settings = quantization_config(group_size=decode.GROUP, modules_to_not_convert=["lm_head"])
    decode.write(tmp_path / "bf16", config, packed=False)
    decode.write(tmp_path / "int4", decode.cut("tiny", 2, quantization_config=settings), packed=True)
    models = {name: awq_core.load(tmp_path / name) for name in ("bf16", "int4")}
    shapes = decode.linears(config)
    for name, model in models.items():
        kinds = [module for module in model.modules() if isinstance(module, QuantLinear)]
        assert len(kinds) == (2 * len(shapes) if name == "int4" else 0)
        with torch.no_grad():
            logits = model(torch.arange(5)[None]).logits
        assert logits.shape == (1, 5, 2048) and torch.isfinite(logits).all() and logits.float().std() > 0.01
    for path, (inputs, outputs) in shapes.items():
        assert models["bf16"].model.layers[0].get_submodule(path).weight.shape == (outputs, inputs)
    # What a step reads: all weights but the embedding's, of which it reads a row.
    read = [
        sum(tensor.nbytes for name, tensor in model.state_dict().items() if "proj" in name or "lm_head" in name)
        for model in (models["bf16"],)
    ]
    packed = sum(
        (tmp_path / "int4" / file).stat().st_size for file in ("layer-000.safetensors", "layer-001.safetensors")
    )
    head = models["bf16"].lm_head.weight.nbytes
    assert decode.ceiling(config) == pytest.approx(read[0] / (packed + head), rel=0.02)


def test_decode_runs_the_command(monkeypatch, capsys, tmp_path):
    """Its table from one paired run at each number of threads; the command's own figures, made up here."""
    import decode

    commands = []
    point = {"batch": 1, "context": 8, "ratio": {"prefill": 0.5, "decode": 3.25, "memory": 0.3}}
    point["speeds"] = [{"decode_tokens_per_second": 26.0}, {"decode_tokens_per_second": 8.0}]

    def run(command, **_):
        commands.append(command)
        threads = int(command[command.index("--threads") + 1])
        return type("Done", (), {"stdout": json.dumps({"threads": threads, "load_average": 1.0, "points": [point]})})

    monkeypatch.setattr(decode.subprocess, "run", run)
    monkeypatch.setattr(decode, "write", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--threads", "1", "2", "--kernel", "reference", "--fuse"])
    decode.main()
    from awq_core.cli.bench import bench

    for command in commands:
        words = command[command.index("bench") + 1 :]
        values = bench.make_context("bench", list(words)).params
        assert Path(values["model"]).name == "int4" and Path(values["against"]).name == "bf16"
        assert values["kernel"] == "reference" and values["fuse"] and values["as_json"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2"]
    assert rows[0][2:] == ["1", "8", "0.50", "3.25", "0.30", "26.0", "against", "8.0"]


PLAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel_worker
from kernel_peers import Peer

def plain(problem, threads):
    print("a library that talks")
    return lambda x: (lambda: x @ problem.weight.T, lambda y: y)

kernel_worker.serve(Peer("none", "cpu", plain, True), 1)
"""


def test_a_peers_process(problem, tmp_path):
    """One answer a request, whatever the peer prints; a failing request is answered too."""
    np.savez(tmp_path / "problem.npz", codes=problem.codes, zeros=problem.zeros, scales=problem.scales)
    x = np.random.default_rng(1).standard_normal((3, 24), np.float32)
    np.save(tmp_path / "x.npy", x)
    requests = [
        {"problem": str(tmp_path / "problem.npz"), "copies": 2},
        {"check": str(tmp_path / "x.npy"), "out": str(tmp_path / "y.npy")},
        {"check": str(tmp_path / "none.npy"), "out": str(tmp_path / "y.npy")},
        {"rows": 5},
        {"turn": 0},
        {"turn": 1},
    ]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(BENCHMARKS)],
        input="".join(json.dumps(one) + "\n" for one in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(requests) and [list(one) for one in answers[:4]] == [[], [], ["missing"], []]
    assert answers[2]["missing"].startswith("FileNotFoundError") and min(one["seconds"] for one in answers[4:]) > 0
    assert np.allclose(np.load(tmp_path / "y.npy"), x @ problem.weight.T, atol=1e-4)


class FakeWorker:
    """A peer of 250 ms a call that computes in fp32."""

    def __init__(self, missing=""):
        self.missing, self.turns = missing, []

    def ask(self, *, problem=None, copies=None, check=None, out=None, rows=None, turn=None):
        from kernel_peers import Problem
        from kernel_worker import Missing

        if problem:
            with np.load(problem) as arrays:
                self.problem = Problem(arrays["codes"], arrays["zeros"], arrays["scales"])
        elif check:
            if self.missing:
                raise Missing(self.missing)
            np.save(out, np.load(check) @ self.problem.weight.T)
        elif turn is not None:
            self.turns.append(turn)
        return 0.25


def test_peers_take_their_turns():
    from kernels import measure

    workers, absent = {"fake": FakeWorker(), "broken": FakeWorker("no such CPU")}, {}
    settings = {"rounds": 3, "spread": 1, "dtype": torch.bfloat16, "device": "cpu", "chosen": ["reference"]}
    lines = measure(256, 64, [1], **settings, workers=workers, absent=absent)
    assert [line["kernel"] for line in lines] == ["linear", "reference", "fake"] and absent == {"broken": "no such CPU"}
    fake = lines[-1]
    assert fake["ms"] == 250 and fake["error"] < 1e-5 and workers["fake"].turns == [0, 1, 2]
    assert fake["bytes"] == 256 * 64 / 2 + 64 * 2 * 0.5 + 64 * 2 * 2, "codes, zero points, fp16 scales"
