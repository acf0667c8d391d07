"""A plan as data: what will happen to every weight, and why. `planning.py` makes it, everything after it reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from awq_core.config import QuantConfig
from awq_core.hooks.types import ComponentPolicy, LayerStack
from awq_core.scale_groups import GroupPlan, Skip


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """One linear's fate. `name` is its path in the model; `reason` is empty when it is quantized."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    quantize: bool
    group_size: int = 0
    clip: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block: its path in the model, its linears and the scale groups that will be searched. `mixtures` are the
    modules, by their path in the block, that can run chosen experts on every token."""

    component: str
    path: str
    linears: tuple[LinearPlan, ...]
    groups: tuple[GroupPlan, ...] = ()
    skipped: tuple[Skip, ...] = ()
    parameters: int = 0
    mixtures: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for linear in self.linears if linear.quantize)

    def local(self, linear: LinearPlan) -> str:
        """The linear's path in the block; empty where the block is the linear."""
        return linear.name.removeprefix(self.path).removeprefix(".")


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The output head, where it is quantized. `tied` names the parameter whose weight it shares in the original, and
    which stays; `rows` are worked at a time."""

    linear: LinearPlan
    tied: str
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every weight's fate.

    Attributes:
        family, plugin, dist, version: who owns the model.
        config: the settings the plan was made for.
        policies: per component, what is done and why.
        blocks: in the order they are worked.
        outside: linears outside every stack; kept, but for the output head where that is asked for.
        bytes_before, bytes_after: size of the weights, in bytes.
        peak_bytes: expected peak memory of quantization, in bytes.
        head: the output head; None where it is kept.
        routers: modules with a matrix that are no `nn.Linear`; kept, and linears in engines.
    """

    model_type: str
    family: str
    plugin: str
    dist: str
    version: str
    config: QuantConfig
    policies: tuple[ComponentPolicy, ...]
    blocks: tuple[BlockPlan, ...]
    outside: tuple[LinearPlan, ...]
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    stacks: tuple[LayerStack, ...] = field(default=())
    head: HeadPlan | None = None
    routers: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears) + self.outside

    @property
    def coverage(self) -> float:
        """Share of block parameters (of the quantized components) that will be 4-bit."""
        blocks = [block for block in self.blocks if block.quantized]
        total = sum(block.parameters for block in blocks)
        done = sum(linear.in_features * linear.out_features for block in blocks for linear in block.quantized)
        return done / total if total else 0.0

    def kept_prefixes(self) -> list[str]:
        """Full module prefixes for `modules_to_not_convert`: whole kept blocks' parents, else single
        linears and routers.

        Engines look for them anywhere in a name, without regard for dots, so "layers.1" would also keep layers 10 to
        19: a prefix that occurs in the name of a quantized linear is made longer.
        """
        quantized = {linear.name for linear in self.linears if linear.quantize}
        return prefixes([*(linear.name for linear in self.linears if not linear.quantize), *self.routers], quantized)

    def unused_names(self) -> list[str]:
        """Entries of the configuration's `modules_to_not_convert` that occur in no linear's name."""
        names = [linear.name for linear in self.linears]
        return [one for one in self.config.modules_to_not_convert if not any(one in name for name in names)]

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        result["config"] = self.config.to_dict()
        result["coverage"] = round(self.coverage, 4)
        return result


def prefixes(kept: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The shortest prefixes of the names `kept` that occur in none of the names `quantized`, each once."""
    text = "\n".join(quantized)
    found: dict[str, None] = {}
    for name in kept:
        parts = name.split(".")
        candidates = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        found[next((prefix for prefix in candidates if prefix not in text), name)] = None
    return list(found)
