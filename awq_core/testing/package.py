"""What the conformance kit asks of a plugin before any model is built: its imports, its distribution, its hooks.

    import awq_core.hooks ── modules loaded so far ──>  import the plugin ── what came on top ──>  nothing but itself

Modules are counted and not seconds: a count is the same on every machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

from packaging.utils import canonicalize_name

from awq_core.hooks import signatures
from awq_core.hooks.manager import PluginInfo

PREFIX = "awq-plugin-"
HOOKS_ONLY = "awq_core.hooks"

# Runs in a process of its own; what this one has loaded must not count.
LOADED = """
import sys, awq_core.hooks
before = set(sys.modules)
import {plugin}
print("\\n" + __import__("json").dumps(sorted(set(sys.modules) - before)))
"""


def loads(plugin: str) -> list[str]:
    """The modules that importing `plugin` loads beside its own, `awq_core.hooks` and the standard library: should be
    none."""
    code = LOADED.format(plugin=plugin)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{plugin} cannot be imported: {(done.stderr.strip().splitlines() or [''])[-1]}"
    own = plugin.partition(".")[0]
    return [name for name in json.loads(done.stdout.splitlines()[-1]) if not _allowed(name, own)]


def _allowed(module: str, own: str) -> bool:
    top = module.partition(".")[0]
    if top == "awq_core":
        return module == HOOKS_ONLY or module.startswith(HOOKS_ONLY + ".")
    return top == own or top in sys.stdlib_module_names


def hook_problems(module: ModuleType) -> list[str]:
    """Every rule of hooks that the plugin breaks."""
    return signatures.problems(module)


def misnamed(infos: list[PluginInfo]) -> list[str]:
    """Distributions that are not called awq-plugin-..., which is the name that errors and searches suggest."""
    return sorted({info.dist for info in infos if not canonicalize_name(info.dist).startswith(PREFIX)})


def twice(architectures: Any) -> list[str]:
    """Model types and class names that two architectures of one plugin claim."""
    claims = [name for arch in architectures for name in (*arch.model_types, *arch.class_names)]
    return sorted({one for one in claims if claims.count(one) > 1})
