"""Who owns a model. Claims are data, so the answer never depends on the order in which plugins were loaded.

    config.architectures (exact class name)  beats  config.model_type
    the plugin the user named                beats  both, if it claims the model at all
    two plugins left                         an error that names both
    nobody left                              an error that says what to install

Never another family's groups: they pass every check of shapes and give a wrong model.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging.utils import canonicalize_name

from awq_core.errors import AwqError, ConfigError, PluginConflictError, PluginError, UnsupportedModelError
from awq_core.hooks.loading import CORE, LOCAL, PluginInfo, describe, unmet
from awq_core.hooks.suggestions import suggest
from awq_core.hooks.types import Architecture

CHOOSE = "plugin={0!r} in Python, --plugin {0} on the command line, or AWQ_PLUGIN_PREFER={0}"


@dataclass(frozen=True)
class Owner:
    """An architecture and the plugin that claims it: what every hook that concerns one model is called with."""

    arch: Architecture
    plugin: str
    dist: str
    version: str

    @property
    def label(self) -> str:
        """How messages call it: plugin 'acorn' (awq-plugin-acorn 0.3.1)."""
        return describe(self.plugin, self.dist, self.version)


@dataclass(frozen=True)
class Conflict:
    """One claim that two or more plugins make: `kind` is "class" or "model type"."""

    kind: str
    claim: str
    owners: tuple[Owner, ...]


def resolve(owners: Sequence[Owner], config: Any, prefer: Sequence[str], plugins: Sequence[PluginInfo]) -> Owner:
    """The one owner of the model described by `config`.

    Args:
        owners: every architecture of every plugin that loaded.
        config: anything with `model_type` and `architectures` (a transformers configuration, a sub-configuration).
        prefer: plugins, or their distributions, that win wherever they claim the model; earlier ones first.
        plugins: every plugin, loaded or not: what the error says when nobody owns the model.
    """
    model_type = getattr(config, "model_type", None) or ""
    classes = tuple(getattr(config, "architectures", None) or ())
    claims = claiming(owners, model_type, classes)
    for name in prefer:
        if mine := claiming([one for one in owners if name in (one.plugin, one.dist)], model_type, classes):
            claims = mine
            break
    if not claims:
        raise unsupported(model_type, classes, plugins)
    names = sorted({one.plugin for one in claims})
    if len(names) > 1:
        labels = sorted({one.label for one in claims})
        raise PluginConflictError(
            f"{_model(model_type, classes)} is claimed by {' and by '.join(labels)}", hint=CHOOSE.format(names[0])
        )
    return _runnable(claims)


def resolve_with(info: PluginInfo, owners: Sequence[Owner], config: Any) -> Owner:
    """The owner of the model among the architectures of one plugin, which the user named."""
    model_type = getattr(config, "model_type", None) or ""
    classes = tuple(getattr(config, "architectures", None) or ())
    mine = claiming([one for one in owners if one.plugin == info.name], model_type, classes)
    if info.state != "ok" or not mine:
        raise not_claimed(info, model_type, classes)
    return _runnable(mine)


def named(name: str, plugins: Sequence[PluginInfo]) -> PluginInfo:
    """The plugin of this name or distribution; a ConfigError with the nearest name when there is none."""
    found = [info for info in plugins if name in (info.name, info.dist)]
    if found:
        return min(found, key=lambda info: info.state != "ok")  # a name may be held by a duplicate as well
    known = sorted({info.name for info in plugins})
    close = difflib.get_close_matches(name, known, n=1)
    nearest = f"did you mean {close[0]!r}?" if close else f"installed: {', '.join(known) or 'none'}"
    raise ConfigError(f"no plugin {name!r} is installed; {nearest}", hint="awq plugins list")


def claiming(owners: Sequence[Owner], model_type: str, classes: Sequence[str]) -> list[Owner]:
    """The owners that claim a model: by class name if any does, else by model type."""
    by_class = [one for one in owners if set(one.arch.class_names) & set(classes)]
    return by_class or [one for one in owners if model_type in one.arch.model_types]


def conflicts(owners: Sequence[Owner], settled_by: Sequence[str] = ()) -> tuple[Conflict, ...]:
    """Every claim made by more than one plugin, none of which is among `settled_by` (plugins or distributions)."""
    claims: dict[tuple[str, str], list[Owner]] = defaultdict(list)
    for one in owners:
        for name in one.arch.class_names:
            claims["class", name].append(one)
        for name in one.arch.model_types:
            claims["model type", name].append(one)
    return tuple(
        Conflict(kind, claim, tuple(those))
        for (kind, claim), those in sorted(claims.items())
        if len({one.plugin for one in those}) > 1
        and not any(name in settled_by for one in those for name in (one.plugin, one.dist))
    )


def missing(owner: Owner) -> list[tuple[str, str]]:
    """The requirements of an architecture that are not met here: (requirement, why)."""
    return [(text, why) for text in owner.arch.requires if (why := unmet(text))]


def _runnable(claims: Sequence[Owner]) -> Owner:
    """The first architecture of one plugin whose requirements are met. A plugin may hold two for the same model,
    one for each range of transformers versions."""
    for one in claims:
        if not missing(one):
            return one
    first = claims[0]
    needs = ", ".join(f"{text} ({why})" for text, why in missing(first))
    install = " ".join(f"'{text}'" for text, _ in missing(first))
    raise PluginError(f"{first.label}: {first.arch.family} needs {needs}", hint=f"pip install {install}")


def unsupported(model_type: str, classes: Sequence[str], plugins: Sequence[PluginInfo]) -> AwqError:
    """The error for a model that no loaded plugin claims: what is installed, what did not load, what to install."""
    dist = suggest(model_type)
    named = [info for info in plugins if dist and canonicalize_name(info.dist) == canonicalize_name(dist)]
    theirs = next((info for info in named if info.state != "ok"), None)
    if theirs is not None and theirs.state != "blocked":
        # installed, but not usable: the model at hand needs it, so its own failure is the news
        return PluginError(
            f"{_model(model_type, classes)} needs {theirs.label}, which was not loaded: {theirs.error}",
            hint=_remedy(theirs),
        )
    families = sorted({family for info in plugins for family in info.families})
    failed = [
        f"{info.label} {info.state}: {info.error}" for info in plugins if info.state in ("broken", "incompatible")
    ]
    message = f"no installed plugin claims {_model(model_type, classes)}; installed families: " + (
        ", ".join(families) or "none"
    )
    if failed:
        message += f"; not loaded: {'; '.join(failed)}"
    if theirs is not None:
        message += f"; {theirs.label} is blocked: {theirs.error}"
        hint = _unblock(theirs)
    elif dist is not None:
        hint = f"pip install {'--upgrade ' if named else ''}{dist}"
    else:
        hint = "--infer, or a plugin of your own: docs/plugins/inference.md and docs/plugins/writing.md show how"
    return UnsupportedModelError(message, hint=hint)


def not_claimed(info: PluginInfo, model_type: str, classes: Sequence[str]) -> AwqError:
    """The error for a plugin that the user named and that does not claim the model."""
    if info.state == "blocked":
        return ConfigError(f"{info.label} is blocked: {info.error}", hint=_unblock(info))
    if info.state != "ok":
        return PluginError(f"{info.label} was not loaded: {info.error}", hint=_remedy(info))
    return UnsupportedModelError(
        f"{info.label} does not claim {_model(model_type, classes)}; it claims {', '.join(info.model_types) or 'none'}",
        hint="leave the plugin out to let the installed plugins' claims decide",
    )


def _unblock(info: PluginInfo) -> str:
    return f"add {info.name} to AWQ_PLUGINS"


def _remedy(info: PluginInfo) -> str:
    core = f"{CORE} " if info.state == "incompatible" else ""
    return "" if info.state == "duplicate" or info.dist == LOCAL else f"pip install --upgrade {core}{info.dist}"


def _model(model_type: str, classes: Sequence[str]) -> str:
    kind = f"model type {model_type!r}" if model_type else "a model without model_type"
    return f"{kind} ({', '.join(classes)})" if classes else kind
