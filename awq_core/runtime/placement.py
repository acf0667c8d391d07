"""Which device each part of a model goes to: one for all of it, or accelerate's `device_map` over several.

A map gives module paths devices, the longest path that fits decides, and "" is all that is not named:

    {"": 0}      {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}

"auto" and its kin let accelerate fill the GPUs there are, with 4-bit linears counted as such. Tensors are read straight
to their device; accelerate's hooks then carry activations from one to the next. Weights stay where they are: there is
no offload, because a kernel's layout is that of its device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from awq_core.devices import pick_device
from awq_core.errors import ConfigError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


@dataclass(frozen=True, slots=True)
class Places:
    """Module path -> device. Call it with the name of a module or tensor."""

    devices: Mapping[str, torch.device]

    def __call__(self, name: str) -> torch.device:
        while name not in self.devices:
            if not name:
                raise ConfigError("device_map leaves parts of the model out", hint='add "": for the rest')
            name = name.rpartition(".")[0]
        return self.devices[name]


def place(
    model: PreTrainedModel, device: str | torch.device, device_map: DeviceMap | None, packed: Collection[str] = ()
) -> Places:
    """Where each part of `model`, a skeleton, goes.

    Args:
        device: for all of it, where there is no map.
        device_map: as above, or one device, or one of `AUTOMATIC`.
        packed: paths of the linears that will hold 4 bits.

    Raises:
        ConfigError: a device that is not there, GPUs mixed with the CPU, a path the model has not, a part left out,
            or accelerate is needed and not installed.
    """
    if device_map is None:
        return Places({"": pick_device(device)})
    if str(device) != "cpu":
        raise ConfigError(f"device={device!r} and a device_map", hint="give one of them")
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        device_map = _automatic(model, device_map, packed)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    modules = dict(model.named_modules())
    for path in device_map:
        if path not in modules:
            raise ConfigError(f"device_map names {path!r}, which the model has not", hint="print(model) shows them")
    found = Places({path: pick_device(_spelled(one)) for path, one in device_map.items()})
    if len({one.type for one in found.devices.values()}) > 1:
        raise ConfigError(
            "device_map puts parts on GPUs and parts on the CPU, and nothing is offloaded",
            hint="more GPUs, or device='cpu'",
        )
    for name, _ in model.named_parameters():
        try:
            found(name)
        except ConfigError as error:
            raise ConfigError(f"device_map leaves {name} out", hint=error.hint) from None
    if len(found.devices) > 1:
        _accelerate()  # before anything is read
    return found


def dispatch(model: PreTrainedModel, places: Places) -> None:
    """Let activations follow the weights from device to device, where the model lies in several places."""
    if len(places.devices) > 1:
        names = {path: str(device) for path, device in places.devices.items()}
        skipped = getattr(model, "_skip_keys_device_placement", None)
        _accelerate().dispatch_model(model, device_map=names, skip_keys=skipped, force_hooks=True)


def _spelled(device: str | int | torch.device) -> str | torch.device:
    return f"cuda:{device}" if isinstance(device, int) else device


def _automatic(model: PreTrainedModel, how: str, packed: Collection[str]) -> dict[str, Any]:
    accelerate = _accelerate()
    from accelerate.utils import CustomDtype, get_balanced_memory

    # Scales and zero points are a thirtieth more; accelerate leaves a tenth of a GPU free.
    options = {
        "no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ()),
        "special_dtypes": {f"{path}.weight": CustomDtype.INT4 for path in packed},
    }
    memory = None
    if how != "sequential":
        memory = get_balanced_memory(model, low_zero=how == "balanced_low_0", **options)
    found: dict[str, Any] = accelerate.infer_auto_device_map(model, max_memory=memory, **options)
    if "disk" in found.values() or ("cpu" in found.values() and len(set(found.values())) > 1):
        raise ConfigError(
            f"device_map={how!r}: the model does not fit, and nothing is offloaded", hint="more or larger GPUs"
        )
    return found


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ConfigError(
            "device_map over several devices needs accelerate", hint='pip install "awq-core[accelerate]"'
        ) from error
    return accelerate
