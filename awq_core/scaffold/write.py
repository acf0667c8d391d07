"""From what inference found to the files of a distribution."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from awq_core.errors import ConfigError, OutputError
from awq_core.hooks import presets
from awq_core.inference import InferredArchitecture
from awq_core.scaffold.source import Call, Raw, source
from awq_core.version import __version__

NAMES = re.compile(r"[a-z][a-z0-9_]*")
FORGOTTEN = {"transformers_version", "architectures", "dtype", "model_type", "torch_dtype", "id2label", "label2id"}


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What was written: the folder, and the paths in it."""

    folder: Path
    files: tuple[str, ...]


def write_plugin(family: str, found: InferredArchitecture, out: Path | None = None, *, tiny: Any = None) -> Scaffold:
    """Write the distribution `awq-plugin-FAMILY`.

    Args:
        family: lower-case name, which becomes the entry point's.
        found: of `awq_core.infer(config, family=family)`.
        out: folder, new or empty; default `awq-plugin-FAMILY` in the current one.
        tiny: the configuration to test with; default the one that was searched.

    Raises:
        ConfigError: a family that can be no module's name. OutputError: the folder has files in it.
    """
    if not NAMES.fullmatch(family):
        raise ConfigError(f"{family!r} is no family name", hint="small letters, digits and _, such as acorn or acorn2")
    dist, module = f"awq-plugin-{family.replace('_', '-')}", f"awq_plugin_{family}"
    folder = out or Path(dist)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: already there", hint="--out DIR, new or empty")
    values = {
        "family": family,
        "dist": dist,
        "module": module,
        "title": "".join(part.capitalize() for part in family.split("_")),
        "constant": family.upper(),
        "core_range": _range(__version__),
        "model_type": found.arch.model_types[0],
        "blocks": found.arch.stacks[0].blocks,
        "summary": "\n".join(_summary(found)),
        "proof": _proof(found),
        "groups": "\n".join(f"| `{g.prev}` | {_code(g.layers)} |" for g in found.arch.scale_groups),
        "unscaled": "".join(f"\n- `{one.linear}` has no scales: {one.why}" for one in found.unscaled) + "\n",
        "imports": ", ".join(_imports(found)),
        "architecture": source(_architecture(family, found), column=len(family) + 3),
        "tiny": source(_fields(tiny or found.tiny), column=7),
    }
    texts = {
        "pyproject.toml": _filled("pyproject.toml", values),
        "README.md": _filled("README.md", values),
        f"{module}/__init__.py": _filled("module.py", values) + _prepare(found),
        f"{module}/py.typed": "",
        f"tests/test_{family}.py": _filled("test.py", values),
        ".github/workflows/test.yml": _filled("ci.yml", values),
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Scaffold(folder, tuple(texts))


def _filled(name: str, values: dict[str, str]) -> str:
    text = files("awq_core.scaffold").joinpath("templates", f"{name}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _architecture(family: str, found: InferredArchitecture) -> Call:
    arch = found.arch
    arguments: list[tuple[str, Any]] = [
        ("family", family),
        ("model_types", arch.model_types),
        ("stacks", Raw("(LANGUAGE,)")),
        ("scale_groups", Raw("presets.LLAMA_BLOCK") if _is_preset(found) else arch.scale_groups),
    ]
    for field in ("exempt", "keep"):
        whys = [Raw(f'"{one.linear}"', one.why) for one in found.unscaled if one.linear in getattr(arch, field)]
        if whys:
            arguments.append((field, tuple(whys)))
    return Call("Architecture", tuple(arguments))


def _is_preset(found: InferredArchitecture) -> bool:
    return frozenset(found.arch.scale_groups) == frozenset(presets.LLAMA_BLOCK)


def _imports(found: InferredArchitecture) -> list[str]:
    return ["Architecture", "LayerStack", *([] if _is_preset(found) else ["ScaleGroup"]), "hookimpl"] + (
        ["presets"] if _is_preset(found) else []
    )


def _prepare(found: InferredArchitecture) -> str:
    """The hook that turns other weights into linears; empty where all are linears."""
    calls = [f'unstack_experts(model, "{one.suffix}", {source(one.names)})' for one in found.prepared.stacked]
    calls += ["linear_conv1d(model)"] if found.prepared.conv1d else []
    if not calls:
        return ""
    functions = (["linear_conv1d"] if found.prepared.conv1d else []) + (
        ["unstack_experts"] if found.prepared.stacked else []
    )
    why = (
        "Experts are stacked in memory, and one linear each on disk."
        if found.prepared.stacked
        else "Conv1D is a linear."
    )
    result = calls[0] if len(calls) == 1 else f"any([{', '.join(calls)}])"
    return _filled("prepare.py", {"functions": ", ".join(functions), "why": why, "result": result})


def _summary(found: InferredArchitecture) -> list[str]:
    """One line a group, readers by their last names."""
    lines = []
    for group in found.arch.scale_groups:
        line = f"{group.prev} -> {', '.join(_short(one) for one in group.layers)}"
        lines.append(line if len(line) <= 110 else f"{line[:106]} ...")
    return lines


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _proof(found: InferredArchitecture) -> str:
    if found.why_not:
        return f"not proved, {found.why_not}."
    return (
        f"{found.proof.groups} groups\nof a tiny random model, folded with random scales, move its outputs by "
        f"{found.proof.error:.0e}; the readers alone by {found.control:.1g}."
    )


def _range(version: str) -> str:
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are not its class's defaults, nested configurations included."""
    try:
        usual = type(config)().to_dict()
    except Exception:  # a class that has none
        usual = {}
    return _unusual(config.to_dict(), usual)


def _unusual(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in given.items():
        if name.startswith("_") or (name in FORGOTTEN and (name != "model_type" or "model_type" not in usual)):
            continue
        if isinstance(value, dict) and "model_type" in value:  # a nested configuration, built by its type
            nested = usual.get(name) or {}
            kind = {"model_type": value["model_type"]}
            kept[name] = kind | _unusual(value, nested if nested.get("model_type") == value["model_type"] else {})
        elif name not in usual or usual[name] != value:
            kept[name] = value
    return kept
