"""AutoAWQ's names: an existing script works after changing its import line.

    from awq_core import AutoAWQForCausalLM                       # was: from awq import AutoAWQForCausalLM
    model = AutoAWQForCausalLM.from_pretrained(path)
    model.quantize(tokenizer, quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"})
    model.save_quantized(out)
    model = AutoAWQForCausalLM.from_quantized(out, fuse_layers=True)

Arguments that steered AutoAWQ's memory use or kernels are accepted and have no effect; each is named below.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from awq_core.api import QuantizeResult, load, quantize
from awq_core.calibration.sources import read_samples
from awq_core.checkpoint.disk import disk_errors
from awq_core.config import QuantConfig
from awq_core.errors import ConfigError, OutputError

# Meaningless here: blocks are streamed from disk, kernels are chosen by what the machine has.
IGNORED_WHEN_OPENING = {"low_cpu_mem_usage", "use_cache", "safetensors", "download_kwargs", "device_map"}
IGNORED_WHEN_QUANTIZING = {"n_parallel_calib_samples", "max_chunk_memory", "duo_scaling"}
IGNORED_WHEN_LOADING = {
    "quant_filename", "max_seq_len", "use_exllama", "use_exllama_v2", "use_ipex", "batch_size",
    "safetensors", "max_memory", "offload_folder", "download_kwargs", "low_cpu_mem_usage", "use_cache",
}  # fmt: skip


class AutoAWQForCausalLM:
    """Made by `from_pretrained` (to quantize) or `from_quantized` (to generate)."""

    def __init__(self, *, path: str | None = None, model: Any = None, options: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.model = model
        self.result: QuantizeResult | None = None
        self._options = dict(options or {})
        self._staging: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        torch_dtype: Any = "auto",
        **kwargs: Any,
    ) -> AutoAWQForCausalLM:
        """Name the model to quantize. Nothing is read yet: `quantize` streams it block by block."""
        _refuse_unknown(kwargs, IGNORED_WHEN_OPENING, "from_pretrained")
        return cls(path=str(model_path), options={"trust_remote_code": trust_remote_code, "dtype": torch_dtype})

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | None = None,
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        apply_clip: bool = True,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        **kwargs: Any,
    ) -> QuantizeResult:
        """Quantize into a temporary folder; `save_quantized` moves it to its place.

        Args:
            quant_config: AutoAWQ's dictionary, or this project's keys.
            calib_data: dataset name, file, folder, list of strings or of token lists.
            split, text_column: of a dataset or file of rows.
        """
        if self.path is None:
            raise ConfigError("this model is quantized already", hint="start from from_pretrained")
        _refuse_unknown(kwargs, IGNORED_WHEN_QUANTIZING, "quantize")
        values = dict(quant_config or {})
        if not apply_clip:
            values["clip"] = "none"
        if isinstance(calib_data, (str, os.PathLike)) and (split, text_column) != ("train", "text"):
            calib_data = read_samples(calib_data, split=split, text_column=text_column)
        self._staging = tempfile.TemporaryDirectory(prefix="awq-")
        self.result = quantize(
            self.path,
            Path(self._staging.name) / "model",
            config=QuantConfig.from_dict(values),
            calibration=calib_data,
            samples=max_calib_samples,
            seq_len=max_calib_seq_len,
            tokenizer=tokenizer,
            **self._options,
        )
        return self.result

    def save_quantized(
        self, save_dir: str | os.PathLike[str], safetensors: bool = True, shard_size: str = "5GB"
    ) -> None:
        """Move the result to `save_dir`; files the script saved there before (a tokenizer) stay.

        Raises:
            ConfigError: nothing was quantized, or pickle was asked for.
            OutputError: the folder already holds a model.
        """
        if self.result is None:
            raise ConfigError("nothing to save", hint="call quantize first")
        if not safetensors:
            raise ConfigError("pickle files are not written", hint="safetensors=True")
        target = Path(save_dir)
        if (target / "config.json").exists():
            raise OutputError(f"{target} already holds a model", hint="choose another folder")
        out = self.result.out
        files = sorted(path for path in out.rglob("*") if path.is_file())
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted(files, key=lambda path: path == out / "config.json"):
                copied = target / path.relative_to(out)
                copied.parent.mkdir(exist_ok=True)
                shutil.copy2(path, copied)

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | os.PathLike[str],
        *,
        device_map: Any = None,
        torch_dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        fuse_layers: bool = False,
        **kwargs: Any,
    ) -> AutoAWQForCausalLM:
        """Load a quantized folder; `generate` and calls go to the transformers model inside.

        Args:
            device_map: of `load`; nothing, or "auto" on a machine with one GPU or none, is the GPU or the CPU.
            fuse_layers: `fuse` of `load`.
        """
        _refuse_unknown(kwargs, IGNORED_WHEN_LOADING, "from_quantized")
        if device_map is None or (device_map in ("auto", "balanced") and torch.cuda.device_count() < 2):
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(
            quant_path, device_map=device_map, dtype=torch_dtype, trust_remote_code=trust_remote_code, fuse=fuse_layers
        )
        return cls(model=model)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without gradients."""
        with torch.inference_mode():
            return self._loaded().generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.__dict__.get("model") is None:
            raise AttributeError(name)
        return getattr(self.__dict__["model"], name)

    def _loaded(self) -> Any:
        if self.model is None:
            raise ConfigError("nothing is loaded", hint="quantize, save_quantized, then from_quantized")
        return self.model


def _refuse_unknown(kwargs: Mapping[str, Any], ignored: set[str], call: str) -> None:
    unknown = sorted(set(kwargs) - ignored)
    if unknown:
        raise ConfigError(
            f"{call}: unknown argument {unknown[0]!r}", hint=f"ignored ones: {', '.join(sorted(ignored))}"
        )
