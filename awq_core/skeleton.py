"""A model without its weights: the configuration, and the module tree on the meta device.

Everything the planner asks (paths, shapes, which linears exist) is answered by this skeleton, so a 70 B model is
planned in seconds from `config.json` alone. Parameters live on the meta device; buffers (rotary tables, masks) are
real, because checkpoints do not store them and nothing would fill them later.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from awq_core.errors import UnsupportedModelError


def model_class(config: PretrainedConfig) -> Any:
    """The class to build: the one `config.architectures` names, else what the Auto classes say."""
    import transformers

    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if cls is not None and not getattr(config, "auto_map", None):
            return cls
    if type(config) in AutoModelForCausalLM._model_mapping or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    raise UnsupportedModelError(
        f"no model class is registered for {type(config).__name__}",
        hint="the plugin's auto_module must call AutoModelForCausalLM.register as well as AutoConfig.register",
    )


_BUILDING = threading.RLock()
LARGE = 1 << 26  # elements; a buffer (a rotary table, a mask) has fewer


class _LargeOnMeta(TorchFunctionMode):
    """Memory for a large tensor is not asked for: the experts of one layer in one tensor are more than many machines
    have, and the system refuses that even where nothing would be written to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None and args:
            shape = args if isinstance(args[0], int) else args[0]
            if math.prod(shape) >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter this thread registers inside becomes a meta tensor at once; buffers stay real."""
    with _BUILDING:
        original: Any = nn.Module.register_parameter
        builder = threading.get_ident()

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta" and threading.get_ident() == builder:
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            original(module, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_skeleton(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model's module tree in `dtype`, in eval mode, parameters on meta, buffers real. `config` is not changed."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = model_class(config)
    build = getattr(cls, "_from_config", None)
    with _parameters_on_meta(), _LargeOnMeta(), no_init_weights():
        if build is not None:
            model = build(config, dtype=dtype)
        else:
            model = cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def empty_twin(model: Any, config: PretrainedConfig) -> Any:
    """A model of the class of `model` with another configuration, parameters on meta and tied as it says."""
    with _parameters_on_meta(), _LargeOnMeta(), no_init_weights():
        twin = type(model)(config)
    twin.tie_weights()
    return twin


def set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` (a dotted path below `module`) by `tensor`, without copying."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def matrices(model: nn.Module) -> list[str]:
    """Paths of the modules with a `weight` of two axes that are no embedding: linears, and routers, which are no
    `nn.Linear` in transformers, but are in engines."""
    found = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            found.append(path)
    return found


def transposed_names(model: nn.Module) -> frozenset[str]:
    """Weights that are `[in, out]` on disk and `[out, in]` in the model: of modules that say `stored_transposed`."""
    modules = model.named_modules(remove_duplicate=False)
    return frozenset(f"{path}.weight" for path, module in modules if getattr(module, "stored_transposed", False))


def checkpoint_names(model: PreTrainedModel, on_disk: tuple[str, ...]) -> dict[str, str]:
    """Name in the model -> name on disk, for every stored tensor the model has a place for.

    transformers renames some checkpoints while loading (a prefix added, a block renamed); its own rules are applied
    here, except those that merge tensors: after `awq_prepare_model` the model has the unmerged ones.
    """
    names: dict[str, str] = {}
    state = model.state_dict()
    for target, name in targets(model, on_disk):
        if target in state:
            names.setdefault(target, name)
    return names


def targets(model: PreTrainedModel, on_disk: tuple[str, ...], also: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """(name in the model, name on disk) for every stored tensor, also those the model has no place for. `also`: names
    that count as the model's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    state = {**model.state_dict(), **dict.fromkeys(also)}
    for name in on_disk:
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        yield (name if name in state and renamed not in state else renamed), name
