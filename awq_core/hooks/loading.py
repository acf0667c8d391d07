"""What is known of a plugin before any of its code runs: its name, its distribution, what it says it needs.

pip checked the requirements once, at installation; `--no-deps` and later upgrades undo that. So they are read again
from the distribution's own metadata, and a plugin written for another core is refused without being imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

GROUP = "awq.plugins"
CORE = "awq-core"
LOCAL = "(local)"
INFERRED = "inferred"  # the name that an architecture goes by which no plugin declares
UNKNOWN = "(unknown distribution)"

State = Literal["ok", "duplicate", "blocked", "incompatible", "broken"]


class RefusedError(Exception):
    """Why a plugin, or what it answered, is refused. Whoever catches it adds which plugin that is."""


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as `awq plugins` shows it.

    Attributes:
        name: entry-point name, which is the family's name.
        dist: the distribution that brought it, "(local)" when it was registered from Python.
        version: version of that distribution.
        state: "ok"; "duplicate": the name was taken; "blocked": not in the allow-list; "incompatible": made for
            another core; "broken": it could not be imported, or breaks the rules of hooks.
        error: one line that says why, when the state is not "ok".
        families: `Architecture.family` of each architecture it brings.
        model_types: every model type it claims.
        hooks: the hooks it implements.
    """

    name: str
    dist: str
    version: str
    state: State = "ok"
    error: str = ""
    families: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How messages call it: plugin 'acorn' (awq-plugin-acorn 0.3.1)."""
        return describe(self.name, self.dist, self.version)

    def failed(self, state: State, why: object) -> PluginInfo:
        """The same plugin in another state, with the reason in one line."""
        return replace(self, state=state, error=" ".join(str(why).split()))


@dataclass(frozen=True)
class Found:
    """An entry point and what its distribution's metadata says, nothing imported yet."""

    name: str
    dist: str
    version: str
    requires: tuple[str, ...]
    entry_point: importlib_metadata.EntryPoint
    fault: str = ""


def describe(name: str, dist: str, version: str) -> str:
    """plugin 'acorn' (awq-plugin-acorn 0.3.1), or plugin 'mine' (local)."""
    return f"plugin {name!r} {LOCAL}" if dist == LOCAL else f"plugin {name!r} ({dist} {version})"


def discover(group: str, entry_points: Iterable[importlib_metadata.EntryPoint] | None = None) -> list[Found]:
    """The entry points of `group`, sorted by distribution, so that the order in which things were installed or in
    which folders are listed never shows."""
    if entry_points is None:
        entry_points = importlib_metadata.entry_points(group=group)
    found = [_read(entry) for entry in entry_points]
    return sorted(found, key=lambda one: (canonicalize_name(one.dist), one.name))


def _read(entry: importlib_metadata.EntryPoint) -> Found:
    if entry.dist is None:
        return Found(entry.name, LOCAL, "0", (), entry)
    try:
        return Found(entry.name, entry.dist.name, entry.dist.version, tuple(entry.dist.requires or ()), entry)
    except Exception as exc:  # an interrupted pip leaves entry points without metadata
        return Found(entry.name, UNKNOWN, "0", (), entry, fault=f"{type(exc).__name__}: {exc}")


def attempt(
    found: Found, allow: Sequence[str] | None, loaded: Sequence[PluginInfo], core_version: str | None
) -> tuple[PluginInfo, object]:
    """Import one plugin, unless there is a reason not to. Returns what is known of it and, when its state is "ok",
    the plugin. Whatever its code raises becomes a state: one plugin never stops another."""
    info = PluginInfo(found.name, found.dist, found.version)
    if allow is not None and not {found.name, found.dist} & set(allow):
        return info.failed("blocked", f"the allow-list has {', '.join(allow) or 'no plugins'}"), None
    taken = next((other for other in loaded if other.name == info.name and other.state != "blocked"), None)
    if taken is not None:
        why = f"{taken.label} has this name; uninstall one, or name the distribution to use in AWQ_PLUGINS"
        return info.failed("duplicate", why), None
    if found.fault:
        return info.failed("broken", found.fault), None
    if mismatch := core_mismatch(found.requires, core_version):
        return info.failed("incompatible", mismatch), None
    try:
        return info, found.entry_point.load()
    except (Exception, SystemExit) as exc:
        return info.failed("broken", f"{type(exc).__name__}: {exc}"), None


def core_mismatch(requires: Iterable[str], core_version: str | None) -> str:
    """Why a distribution with these requirements cannot run on this core; empty when it can."""
    for text in requires:
        requirement = _parsed(text)
        if requirement is None or canonicalize_name(requirement.name) != CORE or core_version is None:
            continue
        if _applies(requirement) and not _contains(requirement, core_version):
            return f"it needs {CORE}{requirement.specifier}, this is {CORE} {core_version}"
    return ""


def unmet(requirement_text: str) -> str:
    """Why one PEP 508 requirement is not met here ("transformers 5.0.0 is installed"); empty when it is."""
    requirement = Requirement(requirement_text)
    if not _applies(requirement):
        return ""
    version = installed_version(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    return "" if _contains(requirement, version) else f"{requirement.name} {version} is installed"


def is_requirement(text: str) -> bool:
    """Whether `text` is a PEP 508 requirement."""
    return _parsed(text) is not None


def installed_version(name: str) -> str | None:
    """Version of a distribution from its metadata, without importing it; None when it is not installed."""
    try:
        return importlib_metadata.version(name)
    except importlib_metadata.PackageNotFoundError:
        return None


def _parsed(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _contains(requirement: Requirement, version: str) -> bool:
    try:  # pre-releases count: a release candidate of the core must be testable with every plugin
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False
