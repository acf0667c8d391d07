"""`awq plugins directory`: every plugin with its families and the versions it was tested with, as a page or as data.

installed plugins (or plugins/*/pyproject.toml below --source)  +  awq_architectures()  ->  docs/plugins/directory.md
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from awq_core.cli.output import print_json
from awq_core.errors import ConfigError
from awq_core.hooks.loading import installed_version
from awq_core.hooks.manager import default_manager
from awq_core.hooks.types import Architecture

TESTED = ("transformers", "torch", "pluggy")  # the packages whose versions a plugin's tests depend on
COMMAND = "awq plugins directory --source plugins"


@dataclass(frozen=True, slots=True)
class Entry:
    """One distribution. `core` is its bound on awq-core, `needs` what its architectures require besides."""

    family: str
    dist: str
    version: str
    core: str
    model_types: tuple[str, ...]
    components: tuple[str, ...]
    needs: tuple[str, ...]
    link: str = ""


@click.command(
    "directory",
    epilog="""\b
Examples:
  awq plugins directory
  awq plugins directory --source plugins > docs/plugins/directory.md
  awq plugins directory --json
""",
)
@click.option(
    "--source",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of plugin sources to read instead of what is installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print data on stdout instead of text.")
def directory_command(source: Path | None, as_json: bool) -> None:
    """Print a directory of plugins: families, distributions, model types, versions tested."""
    entries = from_source(source) if source else installed()
    tested = pinned(source.resolve().parent / "constraints.txt") if source else _here()
    if as_json:
        print_json({"tested": tested, "plugins": [asdict(one) for one in entries]})
    else:
        click.echo("\n".join(page(entries, tested, generated=source is not None)))


def installed() -> list[Entry]:
    """The plugins that load here."""
    import importlib_metadata

    manager = default_manager()
    found = []
    for info in manager.plugins:
        if info.state == "ok":
            try:
                requires = importlib_metadata.requires(info.dist) or []
            except importlib_metadata.PackageNotFoundError:
                requires = []
            architectures = [owner.arch for owner in manager.architectures if owner.plugin == info.name]
            found.append(_entry(info.name, info.dist, info.version, requires, architectures))
    return sorted(found, key=lambda one: one.family)


def from_source(folder: Path) -> list[Entry]:
    """The plugins whose sources are in `folder`, each in a folder of its own, installed or not.

    Raises:
        ConfigError: there are none.
    """
    found = []
    for path in sorted(folder.glob("*/pyproject.toml")):
        project = _toml(path)["project"]
        for family, module in sorted(project.get("entry-points", {}).get("awq.plugins", {}).items()):
            architectures = _load(path.parent, module).awq_architectures()
            needs, link = project.get("dependencies", []), path.parent.name
            found.append(_entry(family, project["name"], project["version"], needs, architectures, link))
    if not found:
        raise ConfigError(f"{folder}: no */pyproject.toml with an entry point in awq.plugins", hint="--source plugins")
    return found


def pinned(constraints: Path) -> dict[str, str]:
    """Versions in a constraints file; empty where there is none."""
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    return {name: pins[name] for name in TESTED if name in pins}


def page(entries: Sequence[Entry], tested: dict[str, str], *, generated: bool = True) -> Iterator[str]:
    """The directory in Markdown, line by line."""
    yield "# Directory of plugins"
    yield ""
    if generated:
        yield f"Written by `{COMMAND}`; a test keeps it current."
        yield f"Tested with {_versions(tested)}."
    else:
        yield f"What is installed here, with {_versions(tested)}."
    yield ""
    yield "| family | distribution | version | for awq-core | model types | also has | needs |"
    yield "|---|---|---|---|---|---|---|"
    for one in entries:
        name = f"[{one.dist}](../../plugins/{one.link}/README.md)" if one.link else one.dist
        kinds = ", ".join(f"`{kind}`" for kind in one.model_types)
        cells = (one.family, name, one.version, one.core, kinds, ", ".join(one.components), ", ".join(one.needs))
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")
    if generated:
        yield ""
        yield "A plugin that is not in this repository: [publishing.md](publishing.md#be-found)."


def _entry(
    family: str,
    dist: str,
    version: str,
    requires: Sequence[str],
    architectures: Sequence[Architecture],
    link: str = "",
) -> Entry:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    bounds = [Requirement(text) for text in requires]
    core = next((str(one.specifier) for one in bounds if canonicalize_name(one.name) == "awq-core"), "")
    components = {stack.component for arch in architectures for stack in arch.stacks} - {"language"}
    return Entry(
        family=family,
        dist=dist,
        version=version,
        core=", ".join(sorted(core.split(","), reverse=True)),
        model_types=tuple(dict.fromkeys(kind for arch in architectures for kind in arch.model_types)),
        components=tuple(sorted(components)),
        needs=tuple(sorted({text for arch in architectures for text in arch.requires})),
        link=link,
    )


def _load(folder: Path, name: str) -> ModuleType:
    """A plugin's module from its source; what is installed under the name is left as it is."""
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key == name or key.startswith(f"{name}.")}
    init = folder.joinpath(*name.split("."), "__init__.py")
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    if spec is None or spec.loader is None:
        raise ConfigError(f"{init}: no such module", hint="the entry point must name a package in that folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]
        sys.modules.update(before)
    return module


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _here() -> dict[str, str]:
    return {name: version for name in TESTED if (version := installed_version(name))}


def _versions(tested: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in tested.items()) or "unknown versions"
