"""AutoAWQ 0.2.9, with the fault repaired that makes its results on a CPU far worse than its method.

`_compute_best_scale` keeps the weights as `{k: v.cpu()}` to put them back after each candidate. On a CPU that is no
copy: the candidates multiply up, and the first stays in the weights. Here the kept weights are copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from transformers import AutoTokenizer

from peers.job import Job


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


def main() -> None:
    job = Job.read("autoawq")
    windows = job.windows()
    AwqQuantizer._compute_best_scale = copying(AwqQuantizer._compute_best_scale)
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
