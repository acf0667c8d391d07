"""Other tools' formats: a quantized folder written again as another toolkit reads it, and theirs as AWQ.

    DIR (gemm, or any layout `checkpoint.foreign` reads)  ->  one linear at a time, as `PackedLinear`  ->  DIR2

Codes, zero points and scales move unchanged, so every format holds the same weights; `formats.FORMATS` names them, and
each has a file of its own here. Converting computes nothing, except for "scaled-fp16", which multiplies out.
"""
