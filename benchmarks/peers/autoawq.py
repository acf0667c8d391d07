"""AutoAWQ 0.2.9, with the faults repaired that make its results far worse than its method.

On a CPU: `_compute_best_scale` keeps the weights as `{k: v.cpu()}` to put them back after each candidate. There that is
no copy: the candidates multiply up, and the first stays in the weights. Here the kept weights are copies.

Of Mixtral: the norm before the experts is divided by the scales and the experts are multiplied, but the router, which
reads the same norm, is not. Here it is. And linears with "k_" in their name get no clip, for the sake of k_proj; the
path of every expert, "block_sparse_moe.experts.0.w1", has it. Here the search sees other names.
"""

from collections.abc import Callable
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer
from awq.quantize.quantizer import AwqQuantizer
from transformers import AutoTokenizer

from peers.job import Job

MOE = "block_sparse_moe"


def copying(search: Callable[..., Any]) -> Callable[..., Any]:
    """`_compute_best_scale`, given a module whose `state_dict` returns copies."""

    def repaired(self: Any, x: Any, w_mean: Any, x_mean: Any, module: torch.nn.Module, *rest: Any) -> Any:
        aliases = module.state_dict
        module.state_dict = lambda *a, **k: {name: value.clone() for name, value in aliases(*a, **k).items()}  # type: ignore
        try:
            return search(self, x, w_mean, x_mean, module, *rest)
        finally:
            del module.state_dict

    return repaired


def scaling_routers(apply_scale: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_scale`, after which a router has the scales of the experts it chooses from."""

    def repaired(module: torch.nn.Module, scales_list: Any, *rest: Any, **named: Any) -> None:
        apply_scale(module, scales_list, *rest, **named)
        for previous, linears, scales in scales_list:
            if "norm" in previous and all(f"{MOE}.experts." in name for name in linears):
                router = module.get_submodule(f"{MOE}.gate")
                router.weight.data.mul_(scales.to(router.weight).view(1, -1))

    return repaired


def clipping_experts(search: Callable[..., Any]) -> Callable[..., Any]:
    """`_search_best_clip`, given names that only q_proj and k_proj stand out of."""

    def repaired(self: Any, layer: Any, named_linears: Any, inputs: Any) -> Any:
        linears, inputs = (
            {name.replace(MOE, "moe"): value for name, value in d.items()} for d in (named_linears, inputs)
        )
        found = search(self, layer, linears, inputs)
        return [(MOE + name.removeprefix("moe") if name.startswith("moe.") else name, most) for name, most in found]

    return repaired


def main() -> None:
    job = Job.read("autoawq")
    windows = job.windows()
    AwqQuantizer._compute_best_scale = copying(AwqQuantizer._compute_best_scale)
    AwqQuantizer._search_best_clip = clipping_experts(AwqQuantizer._search_best_clip)
    quantizer.apply_scale = scaling_routers(quantizer.apply_scale)
    with job.phase("load"):
        tokenizer = AutoTokenizer.from_pretrained(job.source)
        model = AutoAWQForCausalLM.from_pretrained(
            str(job.source), device_map="cpu", torch_dtype=torch.bfloat16, safetensors=True
        )
    with job.phase("quantize"):
        model.quantize(
            tokenizer,
            quant_config={"zero_point": True, "q_group_size": job.group_size, "w_bit": 4, "version": "GEMM"},
            calib_data=windows,
            max_calib_samples=len(windows),
            max_calib_seq_len=len(windows[0]),
            apply_clip=job.options["clip"],
        )
    with job.phase("save"):
        model.save_quantized(str(job.out))


if __name__ == "__main__":
    main()
