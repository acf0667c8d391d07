"""`awq plugins`: what is installed, what it says about its models, and whether all of it can work together.

Answers come from distributions' metadata and from plugins' data, so no command here imports torch or transformers.
With `--json`, stdout holds data only; what was not loaded is said on stderr in either form.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import click

from awq_core.cli.check_plugin import check_command
from awq_core.cli.directory import directory_command
from awq_core.cli.new_plugin import new_command
from awq_core.cli.output import print_json
from awq_core.errors import PluginConflictError, PluginError
from awq_core.hooks import claims, defaults
from awq_core.hooks.loading import PluginInfo
from awq_core.hooks.manager import Owner, PluginManager, default_manager
from awq_core.hooks.types import ComponentPolicy, FusedBlock, LayerStack, ScaleGroup

json_option = click.option("--json", "as_json", is_flag=True, help="Print data on stdout instead of text.")


@click.group(
    epilog="""\b
Examples:
  awq plugins list
  awq plugins show FAMILY
  awq plugins doctor --json
  awq plugins check FAMILY
  awq plugins directory
  awq plugins new FAMILY --from-model MODEL
"""
)
def plugins() -> None:
    """List, show and check the installed architecture plugins, or begin a new one."""


plugins.add_command(check_command)
plugins.add_command(directory_command)
plugins.add_command(new_command)


@plugins.command("list", epilog="\b\nExamples:\n  awq plugins list\n  awq plugins list --json > plugins.json\n")
@json_option
def list_command(as_json: bool) -> None:
    """List the installed plugins, those that did not load included."""
    found = default_manager().plugins
    if as_json:
        print_json([asdict(info) for info in found])
    elif not found:
        click.echo("no plugins are installed; pip install awq-plugin-FAMILY adds one")
    else:
        header = ("name", "distribution", "version", "state", "model types")
        rows = [(info.name, info.dist, info.version, info.state, _claims_or_error(info)) for info in found]
        for line in _columns([header, *rows]):
            click.echo(line)


@plugins.command(
    "show", epilog="\b\nExamples:\n  awq plugins show FAMILY\n  awq plugins show awq-plugin-FAMILY --json\n"
)
@click.argument("name")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show what the plugin NAME (or distribution NAME) declares: claims, blocks, scale groups, components."""
    manager = default_manager()
    info = manager.find(name)
    owners = [owner for owner in manager.architectures if owner.plugin == info.name and info.state == "ok"]
    if as_json:
        print_json({"plugin": asdict(info), "architectures": [asdict(owner.arch) for owner in owners]})
        return
    click.echo(f"{info.label}, {info.state}{f': {info.error}' if info.error else ''}")
    if info.hooks:
        click.echo(f"hooks: {', '.join(info.hooks)}")
    for owner in owners:
        click.echo("")
        for line in _architecture(owner, info.hooks):
            click.echo(line)


@plugins.command(
    "doctor", epilog="\b\nExamples:\n  awq plugins doctor\n  awq plugins doctor --json || echo unhealthy\n"
)
@json_option
def doctor_command(as_json: bool) -> None:
    """Check every plugin. Exit code 0: healthy, 3: two plugins claim one thing, 4: one cannot be used."""
    manager = default_manager()
    infos, conflicts, unmet = manager.plugins, manager.conflicts(), _unmet(manager)
    unusable = {info.name for info in infos if info.state in ("broken", "incompatible")} | {
        one["plugin"] for one in unmet
    }
    rivals = {info.name for info in infos if info.state == "duplicate"}
    rivals |= {owner.plugin for conflict in conflicts for owner in conflict.owners}
    if as_json:
        claimed = [
            {"kind": one.kind, "claim": one.claim, "plugins": sorted({owner.plugin for owner in one.owners})}
            for one in conflicts
        ]
        print_json(
            {
                "healthy": not unusable and not rivals,
                "plugins": [asdict(info) for info in infos],
                "conflicts": claimed,
                "unmet": unmet,
            }
        )
    else:
        for line in _columns(_findings(infos, conflicts, unmet) or [("ok", "no plugins are installed")]):
            click.echo(line)
    if unusable:
        raise PluginError(f"plugins that cannot be used as they are: {', '.join(sorted(unusable))}")
    if rivals:
        raise PluginConflictError(
            f"plugins that claim the same thing: {', '.join(sorted(rivals))}",
            hint=claims.CHOOSE.format(min(rivals)) if conflicts else "uninstall one of each pair",
        )


def _findings(
    infos: Sequence[PluginInfo], conflicts: Sequence[claims.Conflict], unmet: Sequence[dict[str, str]]
) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = [
        (info.state, f"{info.label}{f': {info.error}' if info.error else ''}") for info in infos
    ]
    for conflict in conflicts:
        labels = " and by ".join(sorted({owner.label for owner in conflict.owners}))
        found.append(("conflict", f"{conflict.kind} {conflict.claim!r} is claimed by {labels}"))
    for one in unmet:
        found.append(("unmet", f"plugin {one['plugin']!r}: {one['family']} needs {one['requires']}, {one['why']}"))
    return found


def _unmet(manager: PluginManager) -> list[dict[str, str]]:
    """Requirements that would stop a model from being opened. An architecture that the same plugin replaces by another
    one, for other versions, stops nothing."""
    found = []
    for owner in manager.architectures:
        siblings = [one for one in manager.architectures if one.plugin == owner.plugin and not claims.missing(one)]
        covered = {claim for one in siblings for claim in (*one.arch.model_types, *one.arch.class_names)}
        if not {*owner.arch.model_types, *owner.arch.class_names} <= covered:
            found += [
                {"plugin": owner.plugin, "family": owner.arch.family, "requires": requires, "why": why}
                for requires, why in claims.missing(owner)
            ]
    return found


def _architecture(owner: Owner, hooks: Sequence[str]) -> Iterable[str]:
    """One architecture, in readable form. What a hook decides for each model is named, not guessed."""
    arch = owner.arch
    yield f"architecture {arch.family}"
    yield from _section("model types", _joined(arch.model_types))
    yield from _section("classes", _joined(arch.class_names))
    lacking = dict(claims.missing(owner))
    yield from _section("requires", [f"{text} ({lacking.get(text, 'met')})" for text in arch.requires])
    yield from _section("auto module", [arch.auto_module] if arch.auto_module else [])
    yield from _section("stacks", map(_stack, arch.stacks), hooks, "awq_layer_stacks")
    yield from _section("scale groups", map(_group, arch.scale_groups), hooks, "awq_scale_groups")
    yield from _section("no group", arch.exempt)
    yield from _section("kept", arch.keep)
    yield from _section(
        "components", map(_policy, defaults.awq_component_policies(arch)), hooks, "awq_component_policies"
    )
    yield from _section("fused", map(_fused, arch.fused), hooks, "awq_fused_blocks")


def _section(title: str, lines: Iterable[str], hooks: Sequence[str] = (), hook: str = "") -> Iterable[str]:
    computed = [f"decided for each model by {hook}"] if hook in hooks else []
    for index, line in enumerate([*lines, *computed]):
        yield f"  {'' if index else title:<14}{line}"


def _joined(names: Sequence[str]) -> list[str]:
    return [", ".join(names)] if names else []


def _stack(stack: LayerStack) -> str:
    prelude = f"; also reads {', '.join(stack.prelude)}" if stack.prelude else ""
    borrowed = f"; scale groups from the owner of {stack.groups_from}" if stack.groups_from else ""
    return f"{stack.component}: {stack.blocks}{prelude}{borrowed}"


def _fused(fused: FusedBlock) -> str:
    parts = f" <- {', '.join(fused.parts)}" if fused.parts else ""
    name = f"{fused.name}: " if fused.name else ""
    lowest = f"; compute capability {fused.min_capability}" if fused.min_capability else ""
    return f"{name}{fused.match or 'block'}{parts} by {fused.factory}{lowest}"


def _group(group: ScaleGroup) -> str:
    notes = (
        group.no_clip and f"not clipped: {', '.join(group.no_clip)}",
        group.compensate and f"compensated: {', '.join(group.compensate)}",
        group.observe and f"input of {group.observe}",
        group.norm_offset and f"weight + {group.norm_offset:g}",
        {"all": "", "last": "last rows"}.get(group.prev_rows, "last rows of each head"),
        group.degree != 1 and f"root {group.degree}",
        group.optional and "optional",
    )
    note = "; ".join(str(one) for one in notes if one)
    return f"{group.prev or 'no scales'} -> {', '.join(group.layers)}{f'  [{note}]' if note else ''}"


def _policy(policy: ComponentPolicy) -> str:
    notes = (
        policy.bits and f"{policy.bits} bits",
        policy.group_size and f"group size {policy.group_size}",
        policy.reason,
    )
    note = "; ".join(one for one in notes if one)
    return f"{policy.component}: {policy.action}{f' ({note})' if note else ''}"


def _claims_or_error(info: PluginInfo) -> str:
    return ", ".join(info.model_types) if info.state == "ok" else info.error


def _columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Aligned columns, one line a row: cut to the width of a terminal, whole in a pipe, where grep reads them."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]])[:limit]
