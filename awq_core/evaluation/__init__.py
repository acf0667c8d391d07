"""How good a quantized model is: perplexity on a text, bits per byte, divergence from the model it was made of, which
of two is closer to it, tasks and gates. And how fast.

Two functions bear their modules' names and win: `awq_core.evaluation.perplexity` is the function.
"""

from awq_core.evaluation.c4 import c4_perplexity
from awq_core.evaluation.captions import CaptionResult, caption_batches, caption_perplexity
from awq_core.evaluation.comparison import Comparison, compare_models
from awq_core.evaluation.divergence import DivergenceResult, divergence
from awq_core.evaluation.documents import BitsPerByteResult, bits_per_byte
from awq_core.evaluation.gates import Gate, GateError
from awq_core.evaluation.perplexity import PerplexityResult, perplexity
from awq_core.evaluation.reference import ReferenceLogits
from awq_core.evaluation.samples import SampleDivergence, sample_divergence, text_logits
from awq_core.evaluation.sliding import sliding_perplexity
from awq_core.evaluation.speed import measure_speed
from awq_core.evaluation.tasks import TaskResult, run_tasks
from awq_core.evaluation.weights import WeightComparison, compare_weights

__all__ = [
    "BitsPerByteResult",
    "CaptionResult",
    "Comparison",
    "DivergenceResult",
    "Gate",
    "GateError",
    "PerplexityResult",
    "ReferenceLogits",
    "SampleDivergence",
    "TaskResult",
    "WeightComparison",
    "bits_per_byte",
    "c4_perplexity",
    "caption_batches",
    "caption_perplexity",
    "compare_models",
    "compare_weights",
    "divergence",
    "measure_speed",
    "perplexity",
    "run_tasks",
    "sample_divergence",
    "sliding_perplexity",
    "text_logits",
]
