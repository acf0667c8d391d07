"""An architecture that nobody described, from its configuration alone: traced on a tiny model, and proved.

    configuration ─shrunk─> tiny random model ─one forward─> the list of blocks
    every norm and linear P of one block of each kind ─fold, run, compare─> who reads P       (readers.py)
    all groups of all blocks together ─the plugins' own proof─> error, and a negative control  (architecture.py)

Names mean nothing here. What is proposed is judged by one question: did the outputs move?
"""

from awq_core.inference.architecture import InferredArchitecture, Unscaled, infer
from awq_core.inference.unknown import infer_unknown

__all__ = ["InferredArchitecture", "Unscaled", "infer", "infer_unknown"]
