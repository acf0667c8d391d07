"""What `awq eval --json` measured, as tables. Figures this file does not know are listed under their own names, so that
a document with more in it, or another program's, is shown whole.

A document comes from a file that may have any maker: nothing of it is taken for more than text and numbers, and of a
path only the last name is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from awq_core.errors import ConfigError
from awq_core.report.tables import Table, number, percent

LARGEST = 16 << 20
MOST = 200  # lines of figures without a name of ours


def _nats(value: float) -> str:
    return f"{value:.5f}"


# key of a divergence, what it is, its value where nothing is lost, how it is written
DIVERGENCE = (
    ("kl_mean", "KL divergence, nats a token", "0", _nats),
    ("kl_median", "KL, median", "0", _nats),
    ("kl_p999", "KL, 99.9 % of tokens are below", "0", _nats),
    ("top1_agreement", "same likeliest token", "100%", percent),
    ("top5_agreement", "shared among the five likeliest", "100%", percent),
)


def read_evaluation(path: Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    hint = "make one with `awq eval DIR --against MODEL --json > eval.json`"
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"{path}: too large for an evaluation", hint=hint)
        found = json.loads(content, parse_constant=lambda name: None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {' '.join(str(error).split())}", hint=hint) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: an evaluation is one JSON object", hint=hint)
    if "error" in found:
        raise ConfigError(f"{path} holds an error, not an evaluation: {found['error']}", hint=hint)
    return named(found)


def named(value: Any) -> Any:
    """The document with every absolute path cut to its last name: a report travels with the weights."""
    if isinstance(value, Mapping):
        return {str(key): named(one) for key, one in value.items()}
    if isinstance(value, list):
        return [named(one) for one in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".."))):
        return Path(value).name
    return value


def title(document: Mapping[str, Any]) -> str:
    """What it was measured on: a text, images, or the names of tasks."""
    parts = {name: value for name, value in document.items() if isinstance(value, Mapping)}
    metrics = parts.get("tasks", {}).get("metrics")
    names = (str(name).partition(".")[0] for name in metrics) if isinstance(metrics, Mapping) else ()
    tasks = ", ".join(dict.fromkeys(names))  # "hellaswag" of "hellaswag.acc"
    return str(document.get("text") or parts.get("images", {}).get("source") or tasks or "evaluation")


def table(document: Mapping[str, Any]) -> Table:
    """Perplexity and divergence first, then whatever else there is."""
    left: dict[str, Any] = {key: value for key, value in document.items() if key not in ("model", "text")}
    mine, against = _take(left, "perplexity"), _take(left, "against")
    theirs, apart = _take(against, "perplexity"), _take(against, "divergence")
    rows, notes = [], []
    if _is_number(mine.get("perplexity")):
        ours, original = mine.pop("perplexity"), theirs.pop("perplexity", None)
        change = f"{ours - original:+.4f} ({ours / original - 1:+.2%})" if _is_number(original) and original else "-"
        rows.append(("perplexity", _figure(original), _figure(ours), change))
        notes += [f"Perplexity: {mine.pop('protocol', 'protocol not given')}; {mine.pop('tokens', '?')} tokens."]
    intervals = _take(apart, "intervals")
    error = apart.pop("kl_stderr", None)
    for key, text, same, form in DIVERGENCE:
        if _is_number(value := apart.pop(key, None)):
            figure, ends = form(value), intervals.pop(key, None)
            if isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)):
                figure += f" ({form(ends[0])} to {form(ends[1])})"
            elif key == "kl_mean" and _is_number(error):
                figure += f" ± {form(error)}"
            rows.append((text, same, figure, "-"))
    if "windows" in apart:
        notes.append(
            f"KL: {apart.pop('windows')} windows of {apart.pop('window', '?')} tokens; in brackets 95 % intervals."
        )
    apart.pop("tokens", None)
    if name := against.pop("model", None):
        notes.insert(0, f"Original: {name}.")
    for known in (mine, theirs):
        for key in ("nll", "windows", "window", "protocol", "tokens"):
            known.pop(key, None)
    against.pop("difference", None)
    rest = list(
        _leaves(
            {
                **left,
                "perplexity": mine,
                "original": {**against, **theirs},
                "divergence": {**apart, "intervals": intervals},
            }
        )
    )
    rows += [(name, "-", text, "-") for name, text in rest[:MOST]]
    if len(rest) > MOST:
        notes.append(f"{len(rest) - MOST} more figures are in the document.")
    return Table(("", "original", "quantized", "change"), tuple(rows), " ".join(notes))


def _take(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key, taken out, as a copy; empty where there is none."""
    found = values.pop(key) if isinstance(values.get(key), Mapping) else {}
    return dict(found)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every value that is neither empty nor a container."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from _leaves(one, f"{name}[{index}]")
    elif value is not None and value != "":
        yield name, number(value) if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if _is_number(value) else "-"
