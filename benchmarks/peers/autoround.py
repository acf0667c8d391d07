"""auto-round: its AWQ without clip (its default), or its own SignRound, exported as AutoAWQ's layout.

Only bf16 sources: from fp32 ones it writes the unscaled norms beside the scaled weights.
"""

import torch
from auto_round import AutoRound, AWQConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from peers.job import Job


def main() -> None:
    job = Job.read("auto-round")
    windows = job.windows()
    method: str | AWQConfig = "signround"
    if job.options["method"] == "awq":
        method = AWQConfig(apply_clip=False, awq_seqlen=len(windows[0]))
    with job.phase("load"):
        tokenizer = AutoTokenizer.from_pretrained(job.source)
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.bfloat16)
    with job.phase("quantize"):
        rounder = AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            sym=False,
            group_size=job.group_size,
            alg_configs=method,
            dataset=[torch.tensor([row]) for row in windows],
            nsamples=len(windows),
            seqlen=len(windows[0]),
            batch_size=8,
            device_map="cpu",
        )
        rounder.quantize()
    with job.phase("save"):
        rounder.save_quantized(str(job.out), format="auto_awq")


if __name__ == "__main__":
    main()
