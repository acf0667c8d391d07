"""Plugins: how they are loaded, who owns a model, and how their hooks are called. Nothing else calls pluggy.

    entry points ──each apart──> ok | duplicate | blocked | incompatible | broken     (one line on stderr, never fatal)
    config ──claims──> Owner     (claims.py)
    owner, then the core's defaults ──typed call──> a checked value, or a PluginError that names the plugin and the hook

Load order cannot matter: a hook about one model is asked of that model's owner only, through `subset_hook_caller`, and
the hooks asked of everyone return data that is collected. What the environment may change is in control.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import importlib_metadata
import pluggy

from awq_core.errors import AwqError, PluginError
from awq_core.hooks import claims, control, defaults, signatures, specs, values
from awq_core.hooks.claims import Conflict, Owner
from awq_core.hooks.loading import CORE, GROUP, LOCAL, PluginInfo, RefusedError, attempt, discover, installed_version
from awq_core.hooks.types import Architecture, ComponentPolicy, FusedBlock, KernelBackend, LayerStack, ScaleGroup

if TYPE_CHECKING:
    import torch

DEFAULTS = "awq-core defaults"
T = TypeVar("T")

__all__ = ["Conflict", "Owner", "PluginInfo", "PluginManager", "default_manager", "reset_default_manager"]


class PluginManager:
    """The plugins of one process, or of one test.

    Args:
        allow: names of the plugins (or distributions) that entry points may load; None reads `AWQ_PLUGINS`, and where
            that is unset, loads all. Plugins given to `register` are not restricted.
        core_version: the version that plugins' requirements on awq-core are compared with; None for the installed one.
    """

    def __init__(self, *, allow: Iterable[str] | None = None, core_version: str | None = None) -> None:
        self._core_version = core_version or installed_version(CORE)
        self._allow = control.names("AWQ_PLUGINS") if allow is None else tuple(allow)
        self._plugins: list[PluginInfo] = []
        self._owners: list[Owner] = []
        self._backends: dict[str, tuple[PluginInfo, KernelBackend]] = {}
        self._pm = pluggy.PluginManager("awq")
        self._pm.add_hookspecs(specs)
        self._core = self._admit(defaults, PluginInfo(DEFAULTS, CORE, self._core_version or "unknown"))

    def load_entry_points(
        self, group: str = GROUP, entry_points: Iterable[importlib_metadata.EntryPoint] | None = None
    ) -> None:
        """Load every plugin that installed distributions declare, each apart, so that none can stop another.

        Args:
            group: the entry-point group.
            entry_points: what to load instead of the installed ones.

        Raises:
            PluginError: one did not load and `AWQ_STRICT_PLUGINS=1`.
        """
        known = {(info.name, info.dist) for info in self._plugins}
        found = [one for one in discover(group, entry_points) if (one.name, one.dist) not in known]
        for one in found:
            info, plugin = attempt(one, self._allow, self._plugins, self._core_version)
            if info.state == "ok":
                try:
                    info = self._admit(plugin, info)
                except (RefusedError, AwqError) as exc:
                    info = info.failed("broken", exc)
                except Exception as exc:  # a module can break even dir()
                    info = info.failed("broken", f"{type(exc).__name__}: {exc}")
            self._plugins.append(info)
            if info.state in ("duplicate", "incompatible", "broken"):
                line = f"{info.label} not loaded: {info.error}"
                if control.flag("AWQ_STRICT_PLUGINS"):
                    raise PluginError(line, hint="unset AWQ_STRICT_PLUGINS to go on without it")
                print(line, file=sys.stderr)
        for line in control.reminders(self._allow, found):
            print(line, file=sys.stderr)

    def register(self, plugin: object, name: str, dist: str = LOCAL, version: str = "0") -> PluginInfo:
        """Register a module or object as a plugin, without packaging it.

        Raises:
            PluginError: it breaks a rule of hooks; the message says which and what is right.
        """
        info = PluginInfo(name, dist, version)
        try:
            info = self._admit(plugin, info)
        except RefusedError as refused:
            raise PluginError(f"{info.label} not loaded: {refused}") from refused.__cause__
        self._plugins.append(info)
        return info

    def _admit(self, plugin: object, info: PluginInfo) -> PluginInfo:
        """Check, register and ask the two hooks whose answers are collected; on failure leave no trace."""
        if problems := signatures.problems(plugin):
            raise RefusedError("; ".join(problems))
        if self._pm.get_plugin(info.name) is not None:
            raise RefusedError(f"the name {info.name!r} is taken")
        try:
            if self._pm.is_registered(plugin):
                raise RefusedError(f"it is registered already, as {self._pm.get_name(plugin)!r}")
            hash(plugin)  # pluggy keeps plugins in sets
            self._pm.register(plugin, info.name)
            architectures = self._ask(info, "awq_architectures", values.sequence_of(Architecture)) or ()
            backends = self._ask(info, "awq_kernel_backends", values.sequence_of(KernelBackend)) or ()
            values.collected(architectures, backends, self._backends)
        except BaseException as exc:
            if self._pm.get_plugin(info.name) is plugin:  # pluggy 1.6 leaves half of a refused plugin behind
                self._pm.unregister(name=info.name)
            if isinstance(exc, (TypeError, ValueError, pluggy.PluginValidationError)):
                raise RefusedError(f"{type(exc).__name__}: {exc}") from exc
            raise
        self._owners += [Owner(arch, info.name, info.dist, info.version) for arch in architectures]
        self._backends.update({backend.name: (info, backend) for backend in backends})
        return replace(
            info,
            families=tuple(dict.fromkeys(arch.family for arch in architectures)),
            model_types=tuple(dict.fromkeys(kind for arch in architectures for kind in arch.model_types)),
            hooks=signatures.implemented(plugin),
        )

    @property
    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every plugin that was met, in whatever state."""
        return tuple(self._plugins)

    @property
    def architectures(self) -> tuple[Owner, ...]:
        """Every architecture of every plugin that loaded."""
        return tuple(self._owners)

    def conflicts(self) -> tuple[Conflict, ...]:
        """Claims made by more than one plugin and not settled by `AWQ_PLUGIN_PREFER`."""
        return claims.conflicts(self._owners, settled_by=control.names("AWQ_PLUGIN_PREFER") or ())

    def find(self, name: str) -> PluginInfo:
        """The plugin of this name or distribution.

        Raises:
            ConfigError: there is none; the message has the nearest name.
        """
        return claims.named(name, self._plugins)

    def owner(self, config: Any, plugin: str | None = None) -> Owner:
        """The architecture that owns a model.

        Args:
            config: anything with `model_type` and `architectures`.
            plugin: the plugin (or distribution) to use; without it, `AWQ_PLUGIN_PREFER` and then the claims decide.

        Raises:
            ConfigError: no such plugin. UnsupportedModelError: nobody claims the model. PluginConflictError: two do.
            PluginError: its plugin did not load, or needs another version of something.
        """
        if plugin is None:
            return claims.resolve(self._owners, config, control.names("AWQ_PLUGIN_PREFER") or (), self._plugins)
        return claims.resolve_with(self.find(plugin), self._owners, config)

    # -- typed hook calls

    def layer_stacks(self, owner: Owner, model: torch.nn.Module) -> tuple[LayerStack, ...]:
        """Where the blocks of `model` are."""
        return self._first(owner, "awq_layer_stacks", values.sequence_of(LayerStack), model=model) or ()

    def scale_groups(
        self, owner: Owner, stack: LayerStack, block: torch.nn.Module, index: int
    ) -> tuple[ScaleGroup, ...]:
        """The scale groups of block `index` of `stack`."""
        check = values.sequence_of(ScaleGroup)
        return self._first(owner, "awq_scale_groups", check, stack=stack, block=block, index=index) or ()

    def component_policies(self, owner: Owner, config: Any) -> tuple[ComponentPolicy, ...]:
        """Which components are quantized by default."""
        return self._first(owner, "awq_component_policies", values.sequence_of(ComponentPolicy), config=config) or ()

    def fused_blocks(self, owner: Owner, model: torch.nn.Module, backend: str) -> tuple[FusedBlock, ...]:
        """What a loaded model that runs on kernel `backend` may have replaced."""
        check = values.sequence_of(FusedBlock)
        return self._first(owner, "awq_fused_blocks", check, model=model, backend=backend) or ()

    def calibration_batch(self, owner: Owner, processor: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Model inputs from one calibration sample."""
        return self._first(owner, "awq_calibration_batch", values.mapping, processor=processor, sample=sample) or {}

    def prepare_model(self, owner: Owner, model: torch.nn.Module) -> bool:
        """Let the owner turn weights that are no `nn.Linear` into linears; True when something changed."""
        return bool(self._first(owner, "awq_prepare_model", values.boolean, model=model))

    def kernel_backends(self) -> tuple[KernelBackend, ...]:
        """Every implementation of the int4 linear, the core's and the plugins'."""
        return tuple(backend for _, backend in self._backends.values())

    def _first(self, owner: Owner, hook: str, check: Callable[[Any], T], **arguments: Any) -> T | None:
        """The first answer of the owner and the defaults, checked; None when neither has one."""
        if self._pm.get_plugin(owner.plugin) is None:  # the defaults must not answer in its place
            raise PluginError(f"{owner.label} is not registered with this manager")
        for info in (PluginInfo(owner.plugin, owner.dist, owner.version), self._core):
            try:
                answer = self._ask(info, hook, check, arch=owner.arch, **arguments)
            except RefusedError as refused:
                error = PluginError(f"{info.label}: {refused}", hint="AWQ_DEBUG=1 for the traceback")
                raise error from refused.__cause__
            if answer is not None:
                return answer
        return None

    def _ask(self, info: PluginInfo, hook: str, check: Callable[[Any], T], **arguments: Any) -> T | None:
        """Ask one plugin; None when it does not implement the hook or has nothing to say."""
        caller = getattr(self._pm.hook, hook)
        plugin = self._pm.get_plugin(info.name)
        others = [impl.plugin for impl in caller.get_hookimpls() if impl.plugin is not plugin]
        if len(others) == len(caller.get_hookimpls()):
            return None
        try:
            answer = self._pm.subset_hook_caller(hook, others)(**arguments)
        except AwqError:
            raise
        except (Exception, SystemExit) as exc:
            raise RefusedError(f"{hook} raised {type(exc).__name__}: {exc}") from exc
        if isinstance(answer, list) and not caller.spec.opts["firstresult"]:
            answer = answer[0] if answer else None  # pluggy lists the answers of every plugin; one was asked
        control.trace(info.label, hook, arguments, answer)
        try:
            return None if answer is None else check(answer)
        except RefusedError as wrong:
            raise RefusedError(f"{hook} {wrong}") from None


@functools.cache
def default_manager() -> PluginManager:
    """The manager with every installed plugin, made at the first call and shared by the process."""
    manager = PluginManager()
    manager.load_entry_points()
    return manager


def reset_default_manager() -> None:
    """Forget the shared manager, so that the next call reads the installed plugins and the environment again."""
    default_manager.cache_clear()
