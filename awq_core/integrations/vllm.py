"""A vLLM plugin (entry point group `vllm.general_plugins`) that says how vLLM will read AWQ checkpoints.

vLLM calls `register` in each of its processes. Without `AWQ_CORE_VLLM_OVERRIDE=1` nothing happens, and vLLM is not
imported. With it, one line is logged: vLLM's version and the class that will read a checkpoint of this project. No
kernel of vLLM is replaced: its own are made for the batches it forms, and none of ours was ever run in it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

SWITCH = "AWQ_CORE_VLLM_OVERRIDE"
# What config.json says, as far as vLLM chooses by it.
SECTION = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
METHODS = ("auto_awq", "awq_marlin", "awq")  # vLLM's, newest first; a release has some of them

logger = logging.getLogger(__name__)


def register() -> None:
    """Log which of its methods vLLM will use, where `AWQ_CORE_VLLM_OVERRIDE=1` asks for it. Never raises: a plugin must
    not keep a server from starting. May be called any number of times."""
    if os.environ.get(SWITCH) != "1":
        return
    try:
        version, name, reader = chosen()
    except Exception as error:  # another release of vLLM, arranged in another way
        logger.warning("awq-core: cannot tell how this vLLM reads AWQ checkpoints: %s", error)
        return
    logger.warning("awq-core: vLLM %s reads AWQ checkpoints with %s (%s); nothing is replaced", version, reader, name)


def chosen() -> tuple[str, str, str]:
    """(version, method, class) by which vLLM would read `SECTION`: the first method that claims it, else "awq"."""
    import vllm
    from vllm.model_executor.layers import quantization

    for name in METHODS:
        if name not in quantization.QUANTIZATION_METHODS:
            continue
        reader: Any = quantization.get_quantization_config(name)
        if reader.override_quantization_method(dict(SECTION), None) == name:
            return vllm.__version__, name, reader.__name__
    return vllm.__version__, "awq", quantization.get_quantization_config("awq").__name__
