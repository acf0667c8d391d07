"""A recipe: the settings of a run as a YAML file, with the long options of `awq quantize` for keys.

    model: org/name                 group_size: 32
    calib: corpus.jsonl             component: {vision: keep}

`read_recipe` is strict about the file, and leaves what keys and values mean to the command line. `recipe_text` writes
the effective recipe, the file that lies beside the weights and makes them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from awq_core.calibration.sources import local_path
from awq_core.calibration.subsets import Subsets, shares
from awq_core.errors import ConfigError
from awq_core.hooks.loading import INFERRED
from awq_core.version import __version__

if TYPE_CHECKING:
    import torch

    from awq_core.plan_types import Plan

RECIPE = "recipe.yaml"
LARGEST = 1 << 20
NULL = "tag:yaml.org,2002:null"
EXAMPLE = "a recipe is YAML with lines like `group_size: 32`"
HEADER = """\
# How these weights were made. To make them again: awq quantize --recipe {recipe} --out DIR
# awq-core {version}, {dist} {dist_version}, torch {torch}
# Paths begin where the command is run; of an absolute one, only the last name is here.
"""


class _Words(yaml.SafeLoader):
    """Scalars are the words that were written: `no` is not False, 1.10 not 1.1. Only null is no word.

    The command line converts them, as it does what is typed.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == NULL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} comes twice", key.start_mark)
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe, spelled with underscores, and their values: text, None, or lists and mappings of them.

    Raises:
        ConfigError: the file is missing, no UTF-8, no YAML, no mapping, or has a key twice.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except IsADirectoryError as error:
        hint = f"{path / RECIPE}" if (path / RECIPE).is_file() else EXAMPLE
        raise ConfigError(f"{path}: a folder, not a recipe", hint=hint) from error
    except OSError as error:
        raise ConfigError(f"{path}: no recipe can be read: {error.strerror}", hint="give a YAML file") from error
    if len(data) > LARGEST:
        raise ConfigError(f"{path}: too large for a recipe", hint=EXAMPLE)
    try:
        found = yaml.load(data.decode(), Loader=_Words)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text", hint=EXAMPLE) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply", hint=EXAMPLE) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        problem = ", ".join(filter(None, (getattr(error, name, None) for name in ("context", "problem", "reason"))))
        raise ConfigError(f"{where}: not a recipe: {problem}", hint=EXAMPLE) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values", hint=EXAMPLE)
    result: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name in result:
            raise ConfigError(f"{path}: {name} and {name.replace('_', '-')} are the same key", hint="keep one of them")
        result[name] = value
    return result


def recipe_text(
    plan: Plan,
    *,
    model: str | os.PathLike[str],
    calibration: Any,
    calibrated: Mapping[str, int] | None,
    subsets: Subsets | None = None,
    mixture: Iterable[tuple[str, int]] = (),
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    reuse: str | os.PathLike[str] | None = None,
    target: str = "",
) -> str:
    """The effective recipe of a run; the same text for the same run, wherever and whenever it took place.

    Args:
        model: as the caller named it.
        calibration: as the caller named it; what was given in memory is a comment, as no file can name it.
        calibrated: samples, seq_len and calib_shards as they were used; None where nothing was calibrated.
        subsets: those of the corpus that were chosen.
        mixture: (subset, tokens) of what was used; a comment.
        device: its kind is written, not its number.
        dtype: of activations.
        reuse: folder of the earlier run whose scales and ranges were taken.
        target: the size that `keep` was chosen for; a comment, since the names make the same choice.
        trust_remote_code: a comment too; whoever runs a recipe consents to code for himself.
    """
    import torch

    config, comments = plan.config, []
    values: dict[str, Any] = {"model": _portable(model, local=Path(model).is_dir())}
    if calibrated is not None:
        if isinstance(calibration, (str, os.PathLike)):
            values["calib"] = _portable(calibration, local=local_path(calibration) is not None)
        elif calibration is None:
            comments.append("# calib: the default, the source of Python's standard library\n")
        else:
            comments.append("# calib: it was given in memory, so that this file alone does not make these weights\n")
        values.update(calibrated)
        if subsets:
            chosen = {"calib_subsets": subsets.include, "calib_exclude": subsets.exclude}
            values |= {key: ",".join(names) for key, names in chosen.items() if names}
        if used := shares(mixture):
            comments.append(f"# calibration mixture: {used} of the tokens\n")
    if reuse is not None:
        values["reuse"] = _portable(reuse, local=True)
    if target:
        comments.append(f"# keep: chosen by sensitivity for a target of {target}\n")
    if trust_remote_code:
        comments.append("# trust_remote_code: the run was allowed the model's own Python code (--trust-remote-code)\n")
    values |= {
        "seed": config.seed,
        "bits": config.bits,
        "group_size": config.group_size,
        "no_scale": not config.scale,
        "clip": config.clip,
        "rounding": config.rounding,
        "max_flip_percent": config.max_flip_percent,
        "knee_tolerance": config.knee_tolerance,
        "correct_inputs": config.correct_inputs,
        "correct_bias": config.correct_bias,
        "component": dict(config.components),
        "keep": list(config.modules_to_not_convert),
        "lm_head": config.lm_head,
        "lm_head_chunks": config.lm_head_chunks,
        **({"infer": True} if plan.plugin == INFERRED else {"plugin": plan.plugin}),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    head = HEADER.format(
        recipe=RECIPE, version=__version__, dist=plan.dist, dist_version=plan.version, torch=torch.__version__
    )
    return head + "".join(comments) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def _portable(name: str | os.PathLike[str], *, local: bool) -> str:
    """A hub name as it is. A path starts with a dot, so that nobody looks for it on the hub, and names no folder of
    this machine but those below the one the command was run in."""
    text = os.fspath(name)
    if not local:
        return text
    path = Path(text)
    relative = path.name if path.is_absolute() or text.startswith("~") else path.as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
