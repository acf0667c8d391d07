"""`QuantConfig`: what to do with the weights. Every field has the name and meaning the field's tools use."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from awq_core.errors import ConfigError

GROUP_SIZES = (32, 64, 128, -1)
ROUNDINGS = ("nearest", "heuristic", "greedy", "gptq")
CLIPS = ("asymmetric", "symmetric", "none")
COMPONENT_CHOICES = ("keep", "4bit")
# AutoAWQ's names, accepted wherever a dictionary is.
ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}


def check_component(component: str, choice: str) -> None:
    """Raises ConfigError where `choice` is nothing that can be done with a component."""
    if choice in COMPONENT_CHOICES:
        return
    hint = f"one of {', '.join(COMPONENT_CHOICES)}"
    if choice.removesuffix("bit").isdecimal():
        raise ConfigError(
            f"component {component}={choice}: an AWQ checkpoint holds 4-bit weights, other widths need another format",
            hint=hint,
        )
    raise ConfigError(f"component {component}={choice!r} is not known", hint=hint)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights are quantized.

    Attributes:
        bits: 4, the width an AWQ checkpoint holds.
        group_size: input channels that share one scale and zero point: 32, 64, 128, or -1 for the whole row.
        scale: search AWQ's per-channel scales; False leaves the function untouched before rounding.
        clip: "asymmetric" searches both ends of every group's range on the statistics, "symmetric" both by one factor;
            "none" uses minimum and maximum.
        rounding: how codes are chosen, once scales and ranges are: "nearest"; "heuristic", flips that cancel each
            output's mean error; "greedy", flips that lower the output error most; "gptq", error feedback from column
            to column. All give the same format.
        max_flip_percent: of "heuristic": most flips an output, as a fraction of its inputs.
        knee_tolerance: of "heuristic": protects more of the outlier channels, as a fraction of the larger half.
        correct_inputs: for how much of the drift of their inputs, which the rounding of earlier layers causes, weights
            make up before they are rounded: 0 none, 1 all. Half where rounding is "gptq" and nothing is said.
        correct_bias: let a linear's bias, where it has one, absorb the mean of its rounding error.
        components: per component, "keep" or "4bit"; overrides the plugin's policy.
        modules_to_not_convert: linears whose full name contains one of these strings stay as they are.
        lm_head: quantize the output head too. Few engines load that.
        lm_head_chunks: row chunks the head is worked in; 0 is as many as its size asks for. Changes no byte.
        seed: for sampling calibration windows.

    With `scale=False, clip="none"` and no rounding named this is round-to-nearest and needs no calibration data.
    """

    bits: int = 4
    group_size: int = 128
    scale: bool = True
    clip: str = "asymmetric"
    rounding: str = ""
    max_flip_percent: float = 0.01
    knee_tolerance: float = 0.0
    correct_inputs: float | None = None
    correct_bias: bool = False
    components: Mapping[str, str] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()
    lm_head: bool = False
    lm_head_chunks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rounding:
            object.__setattr__(self, "rounding", "gptq" if self.scale or self.clip != "none" else "nearest")
        if self.correct_inputs is None:
            object.__setattr__(self, "correct_inputs", 0.5 if self.rounding == "gptq" else 0.0)
        if self.bits != 4:
            raise ConfigError(f"bits={self.bits} is not possible", hint="an AWQ checkpoint holds 4-bit weights: bits=4")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"group_size={self.group_size} is not possible", hint=f"one of {', '.join(map(str, GROUP_SIZES))}"
            )
        for name, value, allowed in (("rounding", self.rounding, ROUNDINGS), ("clip", self.clip, CLIPS)):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known", hint=f"one of {', '.join(allowed)}")
        if not 0 <= self.max_flip_percent <= 1:
            raise ConfigError(
                f"max_flip_percent={self.max_flip_percent} is no fraction", hint="0.01 is one in a hundred"
            )
        if self.lm_head_chunks < 0:
            raise ConfigError(f"lm_head_chunks={self.lm_head_chunks} is not possible", hint="0 goes by the head's size")
        if not 0 <= (self.correct_inputs or 0) <= 1:
            raise ConfigError(f"correct_inputs={self.correct_inputs} is no fraction", hint="0.5 is half of the drift")
        for component, choice in self.components.items():
            check_component(component, choice)

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are used at all."""
        corrects = bool(self.correct_inputs) or self.correct_bias
        return self.scale or self.clip != "none" or self.rounding != "nearest" or corrects

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Build from a dictionary; AutoAWQ's keys (`w_bit`, `q_group_size`, `zero_point`, `version`) are understood.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or a value this format cannot hold.
        """
        known = {f.name for f in fields(cls)}
        result: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, key)
            if name == "zero_point":
                if value is not True:
                    raise ConfigError("zero_point=False is not possible", hint="the GEMM format stores zero points")
            elif name == "version":
                if str(value).lower() != "gemm":
                    raise ConfigError(f"version={value!r} is not possible", hint='use "GEMM", which every engine reads')
            elif name == "modules_to_not_convert":
                result[name] = tuple(value or ())
            elif name in known:
                result[name] = value
            else:
                near = difflib.get_close_matches(name, [*known, *ALIASES, "zero_point", "version"], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
                raise ConfigError(f"unknown setting {key!r}", hint=hint)
        return cls(**result)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        kept = list(self.modules_to_not_convert)
        return {**asdict(self), "components": dict(self.components), "modules_to_not_convert": kept}
