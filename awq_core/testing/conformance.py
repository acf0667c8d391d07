"""The tests every architecture plugin inherits.

    class TestFalcon(ArchitectureConformance):
        plugin = "awq_plugin_falcon"

        @staticmethod
        def configs():
            return {"parallel": FalconConfig(hidden_size=64, ...), "new-decoder": FalconConfig(...)}

Each config is a tiny one (a few layers, 64 or so wide). Make them cover what the family varies: grouped-query and
multi-head attention, biases, tied embeddings, dense and mixture layers. No network, no GPU, about a second each.
A message says what is wrong; the test's docstring, which pytest and `awq plugins check` print below it, what to do. An
inherited test may be overridden only to mark it `xfail(reason=...)`.
"""

from __future__ import annotations

from awq_core.testing.folder_tests import FolderTests


class ArchitectureConformance(FolderTests):
    """Subclass, set `plugin`, give `configs`. See `Subject` for the attributes, `PlanTests` and `FolderTests` for the
    tests."""

    def test_no_inherited_test_is_overridden(self) -> None:
        """If this fails: remove the override, or mark it `@pytest.mark.xfail(reason=...)`."""
        for name in dir(ArchitectureConformance):
            mine, base = getattr(type(self), name), getattr(ArchitectureConformance, name)
            if name.startswith("test_") and mine is not base:
                marks = [mark for mark in getattr(mine, "pytestmark", []) if mark.name == "xfail"]
                assert any(mark.kwargs.get("reason") for mark in marks), f"{name} is overridden without a reason"
