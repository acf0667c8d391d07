"""Quality gates: conditions on measured numbers that a build must meet.

    gate     = metric operator number ["%"]          ppl_increase<1%     kl<=0.02     hellaswag.acc>=0.55
    operator = "<" | "<=" | ">" | ">="

"1%" is 0.01. Nothing else is a gate, and nothing is evaluated but this. A number that is NaN meets no condition.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from awq_core.errors import AwqError, ConfigError

GRAMMAR = re.compile(
    r"\s*([a-z_][\w.,:/-]*?)\s*(<=|>=|<|>)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*",
    re.ASCII | re.IGNORECASE,
)
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class GateError(AwqError):
    """A gate was not met."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition; `text` is how it was written."""

    metric: str
    operator: str
    bound: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Raises ConfigError where the text is no gate."""
        match = GRAMMAR.fullmatch(text)
        if not match:
            raise ConfigError(f"{text!r} is no gate", hint="'ppl_increase<1%', 'kl<=0.02', 'task.acc>0.5'")
        name, sign, number, percent = match.groups()
        return cls(name, sign, float(number) / (100 if percent else 1), text.strip())

    def met(self, value: float) -> bool:
        """Whether a measured value meets it."""
        return bool(OPERATORS[self.operator](value, self.bound))


@dataclass(frozen=True, slots=True)
class GateResult:
    """A gate, what was measured, and whether it was met."""

    gate: str
    metric: str
    value: float
    met: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_names(gates: Iterable[Gate], known: Iterable[str], groups: Iterable[str] = ()) -> None:
    """Refuse gates on what is not measured, before it is measured.

    Args:
        known: names of metrics.
        groups: tasks, whose metrics ("task.acc", of a group's member "group_task.acc") are known once they have run.

    Raises:
        ConfigError: a metric that is neither.
    """
    names, groups = sorted(known), list(groups)
    prefixes = tuple(f"{group}{sign}" for group in groups for sign in "._")
    for gate in gates:
        if gate.metric in names or gate.metric.startswith(prefixes):
            continue
        near = difflib.get_close_matches(gate.metric, names, n=1)
        tasks = "".join(f", {group}..." for group in groups)
        raise ConfigError(
            f"gate {gate.text!r}: no metric {gate.metric!r} is measured by this command",
            hint=f"{f'did you mean {near[0]}? ' if near else ''}known here: {', '.join(names) or 'none'}{tasks}",
        )


def check(gates: Iterable[Gate], measured: Mapping[str, float]) -> list[GateResult]:
    """Each gate beside what was measured.

    Raises:
        ConfigError: a gate on something that was not measured.
    """
    gates = list(gates)
    check_names(gates, measured)
    values = [(gate, measured[gate.metric]) for gate in gates]
    return [GateResult(gate.text, gate.metric, value, gate.met(value)) for gate, value in values]


def require(results: Iterable[GateResult]) -> None:
    """Raises GateError, which names them, where some were not met."""
    failed = [result for result in results if not result.met]
    if failed:
        words = "; ".join(f"{result.gate} is not met: {result.metric} = {result.value:.6g}" for result in failed)
        raise GateError(f"quality gate failed: {words}")
