"""What every test of the conformance kit stands on: the plugin, its tiny configurations, and how a plan is made."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, ClassVar

from awq_core.config import QuantConfig
from awq_core.hooks.manager import Owner, PluginManager, default_manager
from awq_core.plan_types import Plan
from awq_core.planning import make_plan
from awq_core.skeleton import build_skeleton


class Subject:
    """The plugin under test.

    Attributes:
        plugin: import name of the plugin package; its entry point must be installed.
        group_size: used for the quantize-and-load tests; must divide the tiny configs' widths.
    """

    plugin: ClassVar[str] = ""
    group_size: ClassVar[int] = 32
    caches: ClassVar[tuple[str, ...]] = ("dynamic", "static")

    @staticmethod
    def configs() -> dict[str, Any]:
        """Name -> tiny configuration."""
        raise NotImplementedError("return {name: tiny config}")

    @classmethod
    def awq_cases(cls) -> dict[str, Any]:
        """Read by the pytest plugin; no cases on the base class itself."""
        return cls.configs() if cls.plugin else {}

    @property
    def manager(self) -> PluginManager:
        return default_manager()

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.plugin)

    def _owner(self, config: Any) -> Owner:
        return self.manager.owner(config)

    def _skeleton(self, config: Any) -> Any:
        skeleton = build_skeleton(config)
        self.manager.prepare_model(self._owner(config), skeleton)
        return skeleton

    def _plan(self, config: Any, **options: Any) -> Plan:
        settings = QuantConfig(group_size=self.group_size, **options)
        return make_plan(self._skeleton(config), self._owner(config), self.manager, settings)
