"""The record of a run: `awq_report.json`, what a run knew and no weight tells.

`quantize` writes it with the weights, and its bytes are as reproducible as theirs: time and memory, which are not, are
added afterwards by `awq quantize`, and evaluations by `awq report`. Linears are rows below one list of column names, so
that a mixture of thousands of experts stays a few megabytes. It holds no path and no name of the machine.

Whoever reads a record may have got it with the weights from somebody else, so every value is checked for its type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from awq_core.checkpoint.disk import disk_errors, write_whole
from awq_core.errors import CheckpointError

RECORD = "awq_report.json"
PAGE = "report.html"
FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One linear. `block` is the path of its block, its own outside of all; `bits` are stored bits a weight, scales and
    zero points included. `kept` is the reason where it was not quantized. The rest is `LinearReport`'s."""

    name: str
    component: str
    block: str
    in_features: int
    out_features: int
    bits: float
    kept: str = ""
    tokens: int = 0
    routed: int | None = None
    family: str = "none"
    alpha: float = 0.0
    beta: float = 0.0
    loss_rtn: float | None = None
    loss: float | None = None
    clipped: float = 0.0
    flipped: float = 0.0
    masked: float = 0.0
    note: str = ""

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def searched(self) -> bool:
        """Whether this run searched scales for it; the identity may have won."""
        return self.family not in ("none", "reused")


@dataclass(frozen=True, slots=True)
class BlockCost:
    """A block's seconds, and the bytes that the process held when it was done."""

    path: str
    seconds: float
    held: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Time and memory. `seconds` of all runs that it took, `peak` the most bytes the process ever held."""

    seconds: float
    peak: int
    blocks: tuple[BlockCost, ...] = ()

    @classmethod
    def of(cls, finished: Mapping[str, Mapping[str, Any]], earlier: Iterable[str], seconds: float) -> Cost:
        """Of the journal's payloads.

        Args:
            earlier: keys of the blocks that runs before this one finished; their time is added.
            seconds: of this run.
        """
        known = {key: payload["cost"] for key, payload in finished.items() if "cost" in payload}
        total = seconds + sum(known[key]["seconds"] for key in earlier if key in known)
        blocks = tuple(BlockCost(key, cost["seconds"], cost["bytes"]) for key, cost in known.items())
        return cls(total, max((cost["peak"] for cost in known.values()), default=0), blocks)


@dataclass(frozen=True, slots=True)
class Record:
    """All of it. `calibration` is empty where nothing was calibrated; `target` and `cost` where there was none."""

    model: str
    family: str
    plugin: str
    dist: str
    versions: dict[str, str]
    config: dict[str, Any]
    device: str
    dtype: str
    calibration: dict[str, Any]
    target: str
    proof_groups: int
    proof_error: float
    bytes_before: int
    bytes_after: int
    coverage: float
    rows: tuple[Row, ...]
    cost: Cost | None = None
    evaluations: tuple[dict[str, Any], ...] = field(default=())

    @property
    def calibrated(self) -> bool:
        return any(row.loss is not None for row in self.rows)

    @property
    def quantized(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.kept)

    def to_json(self) -> str:
        """The text of the file; the same for the same record."""
        result: dict[str, Any] = {"format": FORMAT}
        result |= {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("rows", "cost")}
        names = [one.name for one in fields(Row)]
        result["columns"] = names
        if self.cost is not None:
            blocks = [[block.path, block.seconds, block.held] for block in self.cost.blocks]
            result["cost"] = {"seconds": self.cost.seconds, "peak": self.cost.peak, "blocks": blocks}
        head = json.dumps(result, indent=1, ensure_ascii=False, default=list)
        lines = (json.dumps([getattr(row, name) for name in names], ensure_ascii=False) for row in self.rows)
        rows = ",\n  ".join(lines)
        return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError, KeyError or TypeError where it is none."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT}")
        columns = data["columns"]
        rows = tuple(_typed(Row, dict(zip(columns, values, strict=True))) for values in data["rows"])
        cost = None
        if given := data.get("cost"):
            blocks = tuple(_typed(BlockCost, {"path": p, "seconds": s, "held": b}) for p, s, b in given["blocks"])
            cost = _typed(Cost, {"seconds": given["seconds"], "peak": given["peak"], "blocks": blocks})
        wanted = {one.name for one in fields(cls)}
        values = {key: value for key, value in data.items() if key in wanted}
        values |= {"rows": rows, "cost": cost, "evaluations": tuple(data.get("evaluations", ()))}
        return _typed(cls, values)


def read_record(folder: Path) -> Record:
    """The record in a folder that `quantize` wrote.

    Raises:
        CheckpointError: there is none, or what is there is none.
    """
    path = folder / RECORD
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "name the output folder of `awq quantize`; folders of other tools have no record to report"
        raise CheckpointError(f"{folder} holds no {RECORD}", hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no record of a run: {detail}", hint="quantize again, or mend it") from error


def write_record(folder: Path, *, cost: Cost | None = None, evaluations: Iterable[Mapping[str, Any]] = ()) -> Record:
    """Add to the record in a folder: what the run took, and evaluations. Nothing is written where nothing is added.

    Raises:
        CheckpointError: the folder holds no record.
        OutputError: it cannot be written.
    """
    before = read_record(folder)
    record = add_evaluations(before if cost is None else replace(before, cost=cost), evaluations)
    if record != before:
        with disk_errors(folder):
            write_whole(folder / RECORD, record.to_json().encode())
    return record


def add_evaluations(record: Record, evaluations: Iterable[Mapping[str, Any]]) -> Record:
    """The record with evaluations, each in the place of an earlier one of the same kind, text and original."""
    found = {_about(one): dict(one) for one in (*record.evaluations, *evaluations)}
    return replace(record, evaluations=tuple(found.values()))


def _about(evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells evaluations apart: what they are on, against which original, and which figures they hold."""
    parts = {name: value for name, value in evaluation.items() if isinstance(value, Mapping)}
    original = parts.get("against", {}).get("model")
    on = evaluation.get("text"), parts.get("images", {}).get("source"), original
    kinds = sorted(parts.keys() & {"perplexity", "bits_per_byte", "images"})
    metrics = parts.get("tasks", {}).get("metrics")
    return tuple(map(str, (*on, *kinds, *(sorted(metrics) if isinstance(metrics, Mapping) else ()))))


def _typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with these values, if each has the type that is declared; numbers are finite."""
    key: Any = kind  # mypy takes no class of T for hashable
    hints = _hints(key)
    for name, value in values.items():
        if not _is(value, hints.get(name, Any)):
            raise TypeError(f"{name} is {value!r}")
    return kind(**values)


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def _is(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if hint is Any:
        return True
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_is(one, inner[1]) for one in value.values())
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(one, inner[0]) for one in value)
    if get_origin(hint) is UnionType:
        return any(_is(value, one) for one in inner)
    if hint in (int, float):
        kinds = (int, hint)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)
