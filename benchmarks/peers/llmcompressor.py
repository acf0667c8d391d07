"""llm-compressor: AWQModifier, then QuantizationModifier with the settings of its scheme W4A16_ASYM.

`IntermediatesCache.pin_memory` asks for an accelerator and fails without one; here it does nothing.
"""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from peers.job import Job


def main() -> None:
    job = Job.read("llmcompressor")
    windows = job.windows()
    IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": job.group_size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    with job.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.bfloat16)
        data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]})
    with job.phase("quantize"):
        oneshot(
            model=model,
            dataset=data,
            recipe=[AWQModifier(), QuantizationModifier(ignore=["lm_head"], config_groups=groups)],
            max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
            **job.options,
        )
    with job.phase("save"):
        model.save_pretrained(job.out, save_compressed=True)


if __name__ == "__main__":
    main()
