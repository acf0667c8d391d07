"""Building blocks that plugins may use."""

from awq_core.modules.experts import UnstackedExperts, unstack_experts
from awq_core.modules.fusing import NotFusedError
from awq_core.modules.merged import merge_products
from awq_core.modules.transposed import TransposedLinear, linear_conv1d

__all__ = [
    "NotFusedError",
    "TransposedLinear",
    "UnstackedExperts",
    "linear_conv1d",
    "merge_products",
    "unstack_experts",
]
