"""How the work of a product is divided: a table instead of tuning at the first token.

What `@triton.autotune` would find out while somebody waits is written down: for every device class and number of
tokens, the block of y a program computes, its warps and its pipeline stages. The split follows from the shape: enough
programs to keep every multiprocessor busy, each with enough blocks of inputs to be worth its start.

**Not measured.** The defaults come from the compiled code alone (instructions a weight, registers, bytes in flight);
`docs/triton.md` has the figures. What `awq tune` measures on a machine goes into `TUNED`, which is looked up first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

BUCKETS = (8, 16, 32, 64)
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to divide the work.

    Attributes:
        rows: outputs of one program, 64 or 128.
        tokens: tokens of one program, one of `BUCKETS`.
        split: programs that share the inputs of one block of y.
        warps, stages: of Triton's compiler.
    """

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int

    def halved(self) -> Tile:
        """The same for 64 rows: for a weight that has an odd number of tiles of 64."""
        return replace(self, rows=64)


# Device class -> tokens up to -> (rows, warps, stages); split is worked out. Two warps of 64 rows compile to `mma.sync`
# where four would use Hopper's `wgmma` (fewer instructions from 32 tokens on) or Blackwell's tensor memory (more).
DEFAULTS: dict[str, dict[int, tuple[int, int, int]]] = {
    "sm_80": {8: (128, 4, 4), 16: (128, 4, 4), 32: (128, 4, 4), 64: (128, 4, 3)},
    "sm_89": {8: (128, 4, 4), 16: (128, 4, 4), 32: (128, 4, 4), 64: (128, 4, 3)},
    "sm_90": {8: (128, 4, 4), 16: (64, 2, 4), 32: (128, 4, 4), 64: (128, 4, 3)},
    "sm_100": {8: (64, 2, 4), 16: (64, 2, 4), 32: (64, 2, 4)},
    "cdna": {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2)},
    "rdna": {16: (64, 4, 2)},
    INTERPRETER: {8: (64, 4, 1), 16: (64, 4, 1), 32: (64, 4, 1), 64: (64, 4, 1)},
}

# Device class, dtype, outputs, inputs, group, bucket -> what `awq tune` measured to be best there (`tuned.py`).
Key = tuple[str, torch.dtype, int, int, int, int]
TUNED: dict[Key, Tile] = {}

# From this many tokens on, dequantize and `torch.mm`. Not measured: 256 is where vLLM's Triton path changes over.
CROSSOVER = dict.fromkeys(DEFAULTS, 256)

MIN_BLOCKS = 4
MAX_SPLIT = 16


@lru_cache(maxsize=4096)
def choose(
    device: str, multiprocessors: int, dtype: torch.dtype, outputs: int, inputs: int, group: int, tokens: int
) -> Tile:
    """The tile for x [tokens, inputs] in `dtype` times a weight [outputs, inputs].

    Args:
        device, multiprocessors: what `device_class` says.
        group: inputs that share a scale, 0 for a whole row.
    """
    default = choose_default(device, multiprocessors, outputs, inputs, group, tokens)
    tuned = TUNED.get((device, dtype, outputs, inputs, group, default.tokens))
    if tuned is None:
        return default
    # Measured for one block of tokens; with more of them there are as many times more programs.
    return tuned if tokens <= tuned.tokens else replace(tuned, split=min(tuned.split, default.split))


def choose_default(device: str, multiprocessors: int, outputs: int, inputs: int, group: int, tokens: int) -> Tile:
    """The shipped tile, without regard to what was tuned."""
    table = DEFAULTS[device]
    bucket = next((size for size in table if tokens <= size), max(table))
    rows, warps, stages = table[bucket]
    if group in (32, 64) and bucket == 64:
        rows = 64  # a sum of the group beside that of the row: for 128 rows too many registers
    programs = -(-outputs // rows) * -(-tokens // bucket)
    split = split_for(programs, -(-inputs // 128), bucket, multiprocessors)
    return Tile(rows, bucket, split, warps, stages)


def split_for(programs: int, blocks: int, tokens: int, multiprocessors: int) -> int:
    """Smallest power of two that gives each multiprocessor 4 programs (2 of many tokens), of 4 blocks at the least."""
    wanted = (4 if tokens <= 16 else 2) * multiprocessors
    split = 1
    while programs * split < wanted and blocks >= 2 * split * MIN_BLOCKS and split < MAX_SPLIT:
        split *= 2
    return split


@lru_cache(maxsize=64)
def device_class(device: torch.device) -> tuple[str, int]:
    """The row of `DEFAULTS` for a device, and its multiprocessors; the CPU is Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER, 2
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        return ("cdna" if properties.gcnArchName.startswith("gfx9") else "rdna"), count
    capability = (properties.major, properties.minor)
    if capability >= (10, 0):
        # Consumer Blackwell (12.x) has the tensor cores, and the ratio of bytes to arithmetic, of sm_89.
        return ("sm_89" if capability >= (12, 0) else "sm_100"), count
    return ("sm_90" if capability >= (9, 0) else "sm_80" if capability == (8, 0) else "sm_89"), count
