"""Building blocks that plugins may use."""

from awq_core.modules.experts import UnstackedExperts, unstack_experts

__all__ = ["UnstackedExperts", "unstack_experts"]
