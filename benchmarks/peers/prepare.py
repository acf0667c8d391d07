"""The model and the token windows that every toolkit gets, as a folder and a file.

Random weights have no perplexity worth measuring, and nothing can be downloaded. So the model made here is the
example's, a Llama of 5.8 M parameters that has read real code, widened: with width k each channel is there k times, and

    embedding  [E, E, ..]        norms  [n, n, ..]        linears  k x k blocks  W/k + N_ij,   sum over j of N_ij = 0

Each block row reads k equal copies of the input, so the noise N cancels and the outputs are what they were; but no two
weights are alike, and each has the size that a wide model's have: std(N) = std(W) · sqrt(1/k - 1/k²), column by column.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from awq_core.calibration import CalibrationData, read_samples, standard_library, text_batches
from awq_core.cli.demo_data import held_out_modules, held_out_texts
from peers.layouts import read_tensors

EXAMPLE = Path(__file__).parents[2] / "examples" / "pycoder"
CHARACTERS = 5  # more than a token has, on average
WIDENED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def widen(weights: dict[str, torch.Tensor], config: dict[str, Any], width: int) -> None:
    """Both in place; see above."""
    generator = torch.Generator().manual_seed(0)

    def linear(weight: torch.Tensor) -> torch.Tensor:
        """[out, in] to [k · out, k · in]."""
        size = weight.float().std(0) * (1 / width - 1 / width**2) ** 0.5
        noise = torch.randn(width, width, *weight.shape, generator=generator) * size  # [i, j, out, in]
        noise -= noise.mean(1, keepdim=True)
        blocks = weight.float() / width + noise * (width / max(width - 1, 1)) ** 0.5
        return blocks.permute(0, 2, 1, 3).reshape(width * weight.shape[0], width * weight.shape[1])

    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    config["tie_word_embeddings"] = False
    for name, weight in weights.items():
        if name == "lm_head.weight":
            wide = (weight.float() / width).repeat(1, width)
        elif name == "model.embed_tokens.weight":
            wide = weight.repeat(1, width)
        else:
            wide = linear(weight) if weight.dim() == 2 else weight.repeat(width)
        weights[name] = wide.to(weight.dtype).contiguous()
    for key in WIDENED:
        config[key] *= width


def write_model(source: Path, out: Path, *, width: int, layers: int | None) -> dict[str, Any]:
    """A copy of `source` in bf16, widened and cut to its first layers as asked, that old and new transformers can open.

    Returns its numbers of layers and parameters, and a fingerprint of its weights.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in read_tensors(source).items()}
    if layers is not None:
        beyond = tuple(f"model.layers.{index}." for index in range(layers, config["num_hidden_layers"]))
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(beyond)}
        config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    if width > 1:
        widen(weights, config, width)
    # transformers 5 writes "dtype" and "rope_parameters"; 4.51, which AutoAWQ needs, reads these.
    config["torch_dtype"] = config["dtype"] = "bfloat16"
    rope = config.get("rope_parameters", {})
    config |= {key: value for key, value in rope.items() if key == "rope_theta"}
    # Of use in training alone, and not every toolkit expects what it adds to a block's output.
    config |= {"output_router_logits": False} if "output_router_logits" in config else {}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*.json.*"))
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = out / "tokenizer_config.json"
    if tokenizer.is_file():
        values = json.loads(tokenizer.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":
            tokenizer.write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    fingerprint = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()[:12]
    parameters = sum(tensor.numel() for tensor in weights.values())
    return {"layers": config["num_hidden_layers"], "parameters": parameters, "weights": fingerprint}


def rows(data: CalibrationData) -> list[list[int]]:
    return list(chain.from_iterable(batch["input_ids"].tolist() for batch in data.batches))


def token_windows(tokenizer: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Windows for "calibration", and to measure on for each of the "texts", drawn as `awq_core.quantize` draws them.

    A text without a source is the modules that the example was not trained on.
    """
    held_out = held_out_modules(EXAMPLE)
    length = wanted["seq_len"]
    text = read_samples(wanted["calib"]) if wanted["calib"] else standard_library(held_out)
    data = text_batches(text, tokenizer, n_samples=wanted["samples"], seq_len=length)
    if data.samples < wanted["samples"]:
        raise SystemExit(f"the calibration text holds {data.samples} windows of {length} tokens: give --samples less")
    characters = wanted["windows"] * length * CHARACTERS
    texts = {}
    for name, source in wanted["texts"].items():
        unseen = read_samples(source) if source else held_out_texts(held_out, characters)
        measured = text_batches(unseen, tokenizer, n_samples=wanted["windows"], seq_len=length)
        if measured.samples < wanted["windows"]:
            raise SystemExit(
                f"the text {name} holds {measured.samples} windows of {length} tokens: give --windows less"
            )
        texts[name] = rows(measured)
    return {"calibration": rows(data), "texts": texts}


def main() -> None:
    """Reads what a command of `benchmarks` asks for from a JSON file; prints what there is now as JSON."""
    from transformers import AutoTokenizer

    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(wanted["source"])
    given = wanted["model"]
    made = write_model(Path(given or EXAMPLE), out, width=1 if given else wanted["width"], layers=wanted["layers"])
    windows = token_windows(AutoTokenizer.from_pretrained(out), wanted)
    Path(wanted["tokens"]).write_text(json.dumps(windows), encoding="utf-8")
    print(json.dumps(made))


if __name__ == "__main__":
    main()
