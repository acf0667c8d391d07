"""A quantized folder as a model of lm-evaluation-harness (EleutherAI), by the name "awq".

    import awq_core.integrations.lm_eval
    lm_eval.simple_evaluate(model="awq", model_args={"pretrained": "DIR"}, tasks=["hellaswag"])

It is lm-eval's own model class for transformers around the model that `awq_core.load` makes: how requests are batched
and scored is theirs.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from awq_core.devices import pick_device
from awq_core.model_folder import resolve
from awq_core.runtime.load import load


@register_model("awq")
class AwqLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A folder, or a model that is open already.

    Args:
        pretrained: folder or hub name, quantized or not; or the model.
        tokenizer: by default the folder's own.
        device: "auto", "cpu", "cuda:1"; of a folder.
        trust_remote_code: run the Python code that the folder brings.
        options: of lm-eval's `HFLM`, such as batch_size and max_length.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        device: str | None = "auto",
        trust_remote_code: bool | None = False,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            allowed = bool(trust_remote_code)
            folder = resolve(pretrained)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=allowed)
            pretrained = load(folder, device=str(pick_device(device or "auto")), trust_remote_code=allowed)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
