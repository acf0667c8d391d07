"""GPTQModel, by AWQ or by GPTQ. On two cores it needs the variable to be imported, and the backend for AWQ."""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, extension
from gptqmodel.quantization import FORMAT, METHOD

from peers.job import Job


def main() -> None:
    job = Job.read("gptqmodel")
    windows = job.windows()
    if job.options["method"] == "awq":
        config = QuantizeConfig(
            bits=4, group_size=job.group_size, sym=False, method=METHOD.AWQ, format=FORMAT.GEMM, device="cpu"
        )
        backend = BACKEND.AWQ_TORCH
    else:
        config = QuantizeConfig(bits=4, group_size=job.group_size, sym=job.options["sym"], device="cpu")
        backend = BACKEND.TORCH
        extension.load("pack_block_cpu")  # compiled once a machine: no part of quantizing
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows]
    with job.phase("load"):
        model = GPTQModel.load(str(job.source), config, dtype=torch.bfloat16)
    with job.phase("quantize"):
        model.quantize(data, batch_size=job.options.get("batch_size", 1), backend=backend)
    with job.phase("save"):
        model.save(str(job.out))


if __name__ == "__main__":
    main()
