"""`--infer`: the plugins' manager, or one that knows what inference proved of a model that nobody claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from awq_core.cli.output import note

if TYPE_CHECKING:
    from awq_core.hooks.manager import PluginManager


def manager_for(model: str, *, infer: bool, plugin: str | None, trust_remote_code: bool) -> PluginManager | None:
    """The manager to go on with: None for the ordinary one.

    Raises:
        UnsupportedModelError: nobody claims the model and nothing could be proved of it.
    """
    if not infer:
        return None
    from awq_core.hooks.manager import default_manager
    from awq_core.inference import infer_unknown

    found = infer_unknown(model, default_manager(), plugin=plugin, trust_remote_code=trust_remote_code)
    if found is None:
        note("a plugin claims the model: nothing is inferred")
        return None
    groups = f"{found.proof.groups} scale groups proved, error {found.proof.error:.1e}"
    note(f"inferred from a tiny random model: {groups}, {found.control:.2g} with the readers alone")
    for one in found.unscaled:
        note(f"no scales for {one.linear}: {one.why}")
    return found.manager()
