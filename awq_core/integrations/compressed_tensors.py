"""transformers' `from_pretrained` for the compressed-tensors folders that it (5.23, 5.24) does not load by itself.

    from awq_core.integrations.compressed_tensors import enable, disable

    enable()                                          # or: with enable(): ...
    model = AutoModelForCausalLM.from_pretrained("DIR-ct")

transformers decompresses while it loads, and in three places does so too simply:

    linears of 8 bits beside those of 4     one scheme is taken for all: each gets that of its own name here
    experts with zero points                their zero points are not read when they are stacked: here they are
    GPT-2's Conv1D, which has inputs first  its weight is put in as a linear's: it is turned here

The decompression itself and the matching of names are those of the package compressed-tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from awq_core.errors import ConfigError
from awq_core.integrations.quantizers import put_in, take_out

try:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils.match import match_targets
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
except ImportError as error:  # older releases of transformers decompress after loading, each linear by its own scheme
    raise ConfigError(
        f"loading compressed-tensors needs transformers 5.23, this is {transformers.__version__}: {error}",
        hint='pip install "transformers>=5.23" "compressed-tensors>=0.20"',
    ) from error

METHOD = "compressed-tensors"
PACKED = "weight_packed"
PARTS = (PACKED, "weight_scale", "weight_shape", "weight_zero_point")


def enable() -> ExitStack:
    """Let transformers load packed compressed-tensors folders this way, until `disable`.

    Returns:
        A context manager that undoes it; one that does nothing where it was enabled before.
    """
    return put_in(METHOD, Quantizer)


def disable() -> None:
    """Put back what `enable` replaced; without it, nothing happens."""
    take_out(METHOD, Quantizer)


class Dequantize(CompressedTensorsDequantize):
    """The tensors of a linear, or those of a layer's experts, become 16-bit weights."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: nn.Module, **options: Any
    ) -> dict[str, Any]:
        packed = [key for key in input_dict if key.endswith(f".{PACKED}")]  # of experts, to be stacked
        if packed:
            dtype = model.get_parameter(full_layer_name).dtype
            return {key: self._experts(input_dict, key, full_layer_name, dtype) for key in packed}
        if all(key.endswith(".weight") for key in input_dict):  # of experts that were kept
            return input_dict
        path = full_layer_name.removesuffix(".weight")
        single = {"weight", PACKED} & set(input_dict)
        one = CompressedTensorsDequantize(self.hf_quantizer, self._scheme(path) if single else None)
        found = one.convert(input_dict, *args, full_layer_name=full_layer_name, model=model, **options)
        if PACKED in input_dict and isinstance(model.get_submodule(path), Conv1D):
            found = {name: weight.t().contiguous() for name, weight in found.items()}
        return dict(found)

    def _experts(self, tensors: dict[str, Any], key: str, target: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """One linear of every expert, in their order. `key` ends with the linear's name and its part's."""
        linear = key.removesuffix(f".{PACKED}")
        parts = {part: tensors[f"{linear}.{part}"] for part in PARTS if f"{linear}.{part}" in tensors}
        name = f"{target.rpartition('.')[0]}.0.{linear.rpartition('.')[2]}"
        scheme = self._scheme(name)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or self._config.format)
        each = (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))
        return [compressor.decompress(state, scheme)["weight"].to(dtype) for state in each]

    @property
    def _config(self) -> Any:
        return self.hf_quantizer.compressor.quantization_config

    def _scheme(self, path: str) -> Any:
        """The scheme that names a linear, or else the one that names the class."""
        schemes = {target: scheme for scheme in self._config.config_groups.values() for target in scheme.targets}
        found = match_targets(path, nn.Linear(1, 1, device="meta"), schemes)
        return schemes[found[0]] if found else next(iter(schemes.values()))


class Quantizer(CompressedTensorsHfQuantizer):
    """What transformers asks while it loads a model whose `quant_method` is "compressed-tensors"."""

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": Dequantize}
