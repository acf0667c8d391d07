"""pytest plugin, installed with awq-core: runs every inherited test of `ArchitectureConformance` once a config."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases: Any = getattr(metafunc.cls, "awq_cases", None)
    if cases is not None and "case" in metafunc.fixturenames:
        configs = cases()
        metafunc.parametrize("case", list(configs.values()), ids=list(configs))
