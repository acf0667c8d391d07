"""Inference for a model that no installed plugin claims, and for no other."""

from __future__ import annotations

import os

from awq_core.errors import UnsupportedModelError
from awq_core.hooks.manager import PluginManager
from awq_core.inference.architecture import InferredArchitecture, infer
from awq_core.inference.tiny import WRITE
from awq_core.model_folder import Claim, raw_config, resolve


def infer_unknown(
    model: str | os.PathLike[str],
    manager: PluginManager,
    *,
    plugin: str | None = None,
    trust_remote_code: bool = False,
) -> InferredArchitecture | None:
    """A proved architecture for `model`, or None where a plugin of `manager` claims it.

    Raises:
        UnsupportedModelError: nobody claims it and inference cannot prove anything, or `plugin` does not claim it.
        PluginError, PluginConflictError: somebody does, and cannot be used as it is.
    """
    folder = resolve(model, weights=False)
    try:
        manager.owner(Claim(raw_config(folder)), plugin)
        return None
    except UnsupportedModelError:
        if plugin is not None:
            raise
    found = infer(folder, trust_remote_code=trust_remote_code)
    if found.why_not:
        kind = found.arch.model_types[0]
        raise UnsupportedModelError(f"model type {kind!r} cannot be inferred: {found.why_not}", hint=WRITE)
    return found
