"""NVIDIA Model Optimizer: INT4_AWQ_CFG, whose method is awq_lite; its int4 is symmetric only."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

from peers.job import Job


def set_group_size(config: Any, size: int) -> None:
    """Wherever the configuration says in what blocks weights are quantized, write `size`."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        if isinstance(value, dict) and "block_sizes" in value:
            value["block_sizes"] = {axis: size if axis == -1 else block for axis, block in value["block_sizes"].items()}
        set_group_size(value, size)


def main() -> None:
    job = Job.read("nvidia-modelopt")
    batches = torch.tensor(job.windows()).split(job.options.get("batch_size", 8))
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    set_group_size(config, job.group_size)

    def calibrate(model: Any) -> None:
        for batch in batches:
            model(input_ids=batch)

    with job.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.bfloat16)
    with job.phase("quantize"):
        model = mtq.quantize(model, config, calibrate)
    with job.phase("save"):
        export_hf_checkpoint(model, export_dir=job.out)


if __name__ == "__main__":
    main()
