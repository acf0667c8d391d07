"""`AutoModelForCausalLM.from_pretrained(awq_dir)` with this project's kernels, on CPU and GPU.

    from awq_core.integrations.transformers import enable, disable

    enable()                                          # or: with enable(): ...
    model = AutoModelForCausalLM.from_pretrained("DIR", dtype="bfloat16", device_map="cpu")

transformers keeps one quantizer class for each `quant_method`; `enable` puts `AwqQuantizer` in the place of "awq" and
`disable` puts back what was there. Loading is transformers' own, and a linear passes through three states:

    nn.Linear  ──before loading──>  Awaited (its names and shapes)  ──its tensors are read──>  QuantLinear

Laying out happens tensor by tensor, in the conversion that transformers runs on what it reads, so there is no moment
at which a model exists twice. Which linears are quantized the names in the checkpoint say, as for `awq_core.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer

from awq_core.checkpoint.foreign import logical_names
from awq_core.checkpoint.format import read_quantization_config, validate_packed
from awq_core.checkpoint.pack import PER_WORD, PackedLinear
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.devices import release_freed_memory
from awq_core.errors import CheckpointError, ConfigError, UnsupportedModelError
from awq_core.hooks.manager import default_manager
from awq_core.integrations.quantizers import put_in, take_out
from awq_core.model_folder import Claim
from awq_core.modules import UnstackedExperts
from awq_core.modules.unclaimed import prepare_unclaimed
from awq_core.runtime.grouped import group_experts
from awq_core.runtime.linear import QuantLinear
from awq_core.skeleton import checkpoint_names, transposed_names

METHOD = "awq"
PARTS = ("qweight", "qzeros", "scales")
AGAIN = "download or quantize the model again"


def enable() -> ExitStack:
    """Let transformers load AWQ checkpoints with this project's linears, until `disable`.

    Returns:
        A context manager that undoes it; one that does nothing where it was enabled before.
    """
    return put_in(METHOD, AwqQuantizer)


def disable() -> None:
    """Put back what `enable` replaced; without it, nothing happens."""
    take_out(METHOD, AwqQuantizer)


class Awaited(nn.Module):
    """A linear whose 4-bit weight is still in the file. transformers sees one tensor, of the size of the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        words = torch.empty(self.in_features, self.out_features // PER_WORD, dtype=torch.int32, device="meta")
        self.register_buffer("qweight", words)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.data)


class Arrange(ConversionOps):
    """Three tensors of a linear, on their device, become the `QuantLinear` that takes the place of the `Awaited`."""

    def __init__(self, hf_quantizer: AwqQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this transformers knows that scales are not to be cast

    def __deepcopy__(self, memo: Any) -> Arrange:
        return self  # transformers copies a converter for each linear

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        path = full_layer_name.removesuffix(f".{PARTS[0]}")
        awaited = model.get_submodule(path)
        packed = PackedLinear(*(input_dict[_pattern(part)][0] for part in PARTS))
        backends = default_manager().kernel_backends()
        made = QuantLinear(packed, awaited.bias, awaited.dtype, backends=backends)  # type: ignore[arg-type]
        # transformers fills buffers that are not saved anew after loading, and these it must not touch.
        made._non_persistent_buffers_set.clear()
        made._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(path, made)
        missing_keys.discard(full_layer_name)
        return {}


class AwqQuantizer(HfQuantizer):
    """What transformers asks while it loads a model whose `quant_method` is "awq".

    Raises:
        CheckpointError: a layout that is not read, a packed tensor the model has no place for, a bias that is missing.
        ConfigError: weights on disk, or on GPUs and the CPU at once; weights that are not in safetensors files.
    """

    requires_calibration = True
    is_trainable = False

    def validate_environment(self, *args: Any, device_map: Any = None, **_: Any) -> None:
        values = self.quantization_config.to_dict()
        plain = {key: getattr(value, "value", value) for key, value in values.items()}
        settings = read_quantization_config({"quantization_config": {**plain, "quant_method": METHOD}})
        assert settings is not None, "the section is there"
        self.settings = settings
        if isinstance(device_map, Mapping):
            kinds = {"cuda" if isinstance(one, int) else str(one).partition(":")[0] for one in device_map.values()}
            if "disk" in kinds or len(kinds) > 1:
                raise ConfigError(
                    f"device_map uses {' and '.join(sorted(kinds))}, and 4-bit weights are not offloaded",
                    hint="GPUs only, or the CPU only",
                )

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
            raise ConfigError("4-bit weights are read from safetensors files only", hint="name the model's folder")
        self._prepared = _prepare(model)
        with CheckpointReader(Path(checkpoint_files[0]).parent) as reader:
            self._await_linears(model, reader)

    def _await_linears(self, model: Any, reader: CheckpointReader) -> None:
        """Put an `Awaited` in place of every linear that is packed, after a look at the shapes in the files."""
        stored = logical_names(reader.names, self.settings)
        names = checkpoint_names(model, tuple(stored))
        found = {name.removesuffix(".weight"): on_disk for name, on_disk in names.items() if stored[on_disk]}
        strays = {on_disk for on_disk, packed in stored.items() if packed} - set(found.values())
        if strays:
            raise CheckpointError(
                f"the model has no linear for {len(strays)} packed weights, first {min(strays)}",
                hint="does a plugin claim this model? awq plugins list",
            )
        if turned := sorted(transposed_names(model) - {f"{path}.weight" for path in found}):
            raise UnsupportedModelError(
                f"{turned[0]} is stored transposed, which transformers' loader does not undo", hint="awq_core.load"
            )
        for path, module in model.named_modules():
            held = module.named_parameters(path) if isinstance(module, UnstackedExperts) else ()
            if lost := [name for name, _ in held if name not in names]:
                raise UnsupportedModelError(
                    f"{lost[0]} is stored in one piece with other experts, which is not taken apart here",
                    hint="awq_core.load",
                )
        for path, on_disk in found.items():
            linear, base = model.get_submodule(path), on_disk.removesuffix(".weight")
            if not isinstance(linear, nn.Linear):
                raise CheckpointError(f"{path} is packed, and a {type(linear).__name__} in the model", hint=AGAIN)
            if linear.bias is not None and f"{path}.bias" not in names:
                raise CheckpointError(f"{path}.bias is missing", hint=AGAIN)
            parts = [f"{base}.{part}" for part in PARTS]
            shapes = (torch.empty(reader.shape(one), dtype=reader.dtype(one), device="meta") for one in parts)
            validate_packed(
                path, PackedLinear(*shapes), linear.in_features, linear.out_features, self.settings.group_size
            )
            model.set_submodule(path, Awaited(linear))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """transformers' renamings, and ours; its merging of experts not where a plugin has taken them apart."""
        kept = [one for one in weight_conversions if not (self._prepared and isinstance(one, WeightConverter))]
        return [WeightConverter([_pattern(part) for part in PARTS], [f".{PARTS[0]}"], [Arrange(self)]), *kept]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for path, module in model.named_modules():
            if isinstance(module, Awaited):
                raise CheckpointError(f"{path} was not loaded", hint=AGAIN)
            if isinstance(module, QuantLinear):
                module._non_persistent_buffers_set.update(module._buffers)
        if not hasattr(model, "_hf_hook"):  # accelerate's hooks are on each expert and would be passed by
            group_experts(model)
        release_freed_memory()
        return model


def _prepare(model: Any) -> bool:
    """Let the model's plugin turn what is no linear into linears, as `awq_core.load` does; whether it did."""
    manager = default_manager()
    try:
        owner = manager.owner(Claim(model.config.to_dict()))
    except UnsupportedModelError:
        return bool(prepare_unclaimed(model).stacked)
    return manager.prepare_model(owner, model)


def _pattern(part: str) -> str:
    """The regular expression by which transformers recognises a tensor."""
    return rf"\.{part}$"
