"""How good a quantized model is: perplexity on a text, and divergence from the model it was made of.

The functions bear their modules' names and win: `awq_core.evaluation.perplexity` is the function.
"""

from awq_core.evaluation.divergence import DivergenceResult, divergence
from awq_core.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["DivergenceResult", "PerplexityResult", "divergence", "perplexity"]
