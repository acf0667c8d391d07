"""Running a quantized model: `load` builds it, `linear` holds the 4-bit weights."""
