"""How good a quantized model is: perplexity on a text, divergence from the model it was made of, and which of two is
closer to it.

Two functions bear their modules' names and win: `awq_core.evaluation.perplexity` is the function.
"""

from awq_core.evaluation.comparison import Comparison, compare_models
from awq_core.evaluation.divergence import DivergenceResult, divergence
from awq_core.evaluation.perplexity import PerplexityResult, perplexity
from awq_core.evaluation.weights import WeightComparison, compare_weights

__all__ = [
    "Comparison",
    "DivergenceResult",
    "PerplexityResult",
    "WeightComparison",
    "compare_models",
    "compare_weights",
    "divergence",
    "perplexity",
]
