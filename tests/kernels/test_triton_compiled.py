"""The Triton kernels compiled for GPUs that are not here, and their machine code read.

Triton's own package brings the assemblers and disassemblers. Spills come from the compiled object, instructions from
its SASS. What is counted, and why these limits: `docs/triton.md`.
"""

import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

from awq_core.kernels.triton.tiles import DEFAULTS, choose

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")):
    pytest.skip("this triton brings no NVIDIA tools", allow_module_level=True)

TARGETS = {"sm_80": "sm_80", "sm_89": "sm_89", "sm_90": "sm_90", "sm_100": "sm_100", "cdna": "gfx942"}
POINTERS = {"tiles": "i16", "scales": "fp16", "zeros": "u8", "partial": "fp32", "arrived": "i32"}
POINTERS |= {"experts": "i32", "pairs": "i32", "weights": "fp32", "mask": "u8", "positions": "i64"}
NUMBERS = dict.fromkeys(("eps", "offset", "scale", "softcap"), "fp32")
# Numbers that are not known to be multiples of 16.
RAGGED = {"M", "blocks", "top_k", "T", "L", "Hq", "Hkv", "heads", "mask_batch", "mask_cell", *NUMBERS}


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes on NVIDIA, registers on AMD
    code: str


def machine(target):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def compiled(kernel, target, dtype, constants, *, warps, stages, folder):
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {}
    for name in names:
        pointer = name.removesuffix("_ptr")
        kinds[name] = f"*{POINTERS.get(pointer, dtype)}" if pointer != name else NUMBERS.get(name, "i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    even = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name not in RAGGED and kinds[name] != "constexpr"
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=even)
    made = triton.compile(source, target=machine(target), options={"num_warps": warps, "num_stages": stages})
    if not target.startswith("sm_"):
        code = made.asm["amdgcn"]
        count = {name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return Compiled(count["vgpr_count"], count["vgpr_spill_count"], code)
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", file)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(int(registers), int(stack), tool("nvdisasm", "-c", file))


def tool(name, *arguments):
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """product(target, dtype, (tokens, rows, warps, stages), GROUP=64): the compiled matrix product, made once."""
    from awq_core.kernels.triton.matmul import matmul_kernel

    folder = tmp_path_factory.mktemp("compiled")

    @cache
    def product(target, dtype, work, **changed):
        tokens, rows, warps, stages = work
        constants = {"OUTPUTS": rows, "TOKENS": tokens, "SPLIT": 8, "GROUP": 128, "EVEN_N": True, "EVEN_K": True}
        constants |= {"BF16": dtype == "bf16", "ASM": target.startswith("sm_"), "WIDE": False, "SWIGLU": False}
        constants |= {} if changed.pop("grouped", False) else {"experts_ptr": None, "pairs_ptr": None}
        constants |= changed
        return compiled(matmul_kernel, target, dtype, constants, warps=warps, stages=stages, folder=folder)

    return product


def table(device):
    return [(tokens, *work) for tokens, work in DEFAULTS[device].items()]


# -- reading SASS -----------------------------------------------------------------------------------------------------


def instructions(sass):
    """Each instruction's text without its predicate; and where labels stand."""
    found, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"^\.(L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            found.append(instruction[1])
    return found, labels


def name_of(instruction):
    return re.split(r"[.\s]", instruction, maxsplit=1)[0]


def main_loop(sass):
    """The longest loop with tensor-core products in it: from its label to the branch back."""
    found, labels = instructions(sass)
    loops = []
    for at, text in enumerate(found):
        branch = re.search(r"^BRA.*`\(\.(L_x_\d+)\)", text)
        if branch and labels.get(branch[1], at) < at:
            loops.append(found[labels[branch[1]] : at + 1])
    loops = [loop for loop in loops if any(name_of(text) in ("HMMA", "HGMMA", "UTCHMMA") for text in loop)]
    return max(loops, key=len)


def hazards(sass):
    """`wgmma` reads its left operand from registers while the program goes on: writes to them before it has waited.

    ptxas before 13.3 is known to emit such writes (triton-lang/triton issue 9433).
    """
    read, wrong, products = set(), [], 0
    for text in instructions(sass)[0]:
        if product := re.match(r"HGMMA\.64x\d+x16\S*\s+R\d+,\s+R(\d+),\s+gdesc", text):
            products += 1
            read |= set(range(int(product[1]), int(product[1]) + 4))
        elif text.startswith("WARPGROUP.DEPBAR"):
            read = set()
        elif written(text) & read:
            wrong.append(text)
    return products, wrong


NO_RESULT = ("ST", "RED", "BAR", "BRA", "WARPGROUP", "EXIT", "LDGSTS", "LDGDEPBAR", "DEPBAR", "SYNCS", "NOP", "MEMBAR")


def written(text):
    """Numbers of the registers an instruction writes: its first operand, and what follows in wide ones."""
    result = re.match(r"\S+\s+R(\d+)\b", text)
    if not result or text.startswith(NO_RESULT):
        return set()
    name = text.split()[0]
    width = 4 if ".128" in name or name.startswith("LDSM") else 2 if ".64" in name or ".WIDE" in name else 1
    return set(range(int(result[1]), int(result[1]) + width))


# -- what must hold ---------------------------------------------------------------------------------------------------


def worth_a_look(device):
    """All tiles for Hopper; of the others the smallest and the largest, to save time."""
    return table(device) if device == "sm_90" else [table(device)[0], table(device)[-1]]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("device", "work"), [(device, work) for device in TARGETS for work in worth_a_look(device)], ids=str
)
def test_nothing_spills(product, device, work, dtype):
    made = product(TARGETS[device], dtype, work)
    assert made.spilled == 0, f"{made.spilled} spilled with {made.registers} registers"


@pytest.mark.parametrize(
    ("tokens", "changed"),
    [
        (1, {"M": 1, "top_k": 1}),  # as Triton compiles it for one token: whole numbers of 1 become constants
        (1, {"M": 1, "top_k": 1, "blocks": 1, "SPLIT": 1}),
        (1, {"GROUP": 32}),
        (64, {"GROUP": 32}),
        (64, {"GROUP": 64}),
        (64, {"GROUP": 0}),
        (64, {"EVEN_N": False, "EVEN_K": False}),
        (64, {"SWIGLU": True}),
        (64, {"SPLIT": 1, "bias_ptr": None, "residual_ptr": None, "grouped": True}),
    ],
    ids=str,
)
def test_no_variant_spills(product, tokens, changed):
    import torch

    tile = choose("sm_90", 132, torch.bfloat16, 4096, 4096, changed.get("GROUP", 128), tokens)
    work = (tile.tokens, tile.rows, tile.warps, tile.stages)
    assert product("sm_90", "bf16", work, **changed).spilled == 0


# Of 128 lanes a clock and multiprocessor, one weight may take 3.56 while an H200 reads it at full speed. From about 47
# tokens on the tensor cores take longer than that, and there is more time.
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("work", table("sm_90"), ids=str)
def test_instructions_a_weight_on_hopper(product, work, dtype):
    tokens, rows, warps, _ = work
    loop = main_loop(product("sm_90", dtype, work).code)
    each = len(loop) / (rows * 128 / (warps * 32))
    assert each <= (3.0 if tokens < 48 else 3.2), f"{each:.2f}: {Counter(map(name_of, loop)).most_common(9)}"


@pytest.mark.parametrize("device", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_decoding_takes_few_instructions_everywhere(product, device):
    tokens, rows, warps, stages = table(device)[0]
    made = product(device, "bf16", (tokens, rows, warps, stages))
    assert len(main_loop(made.code)) / (rows * 128 / (warps * 32)) <= 3.0
    assert "LDGSTS.E.BYPASS" in made.code, "weights do not go to shared memory past the L1 cache"
    assert re.search(r"LDGSTS\S*\.128", made.code), "weights are not read 16 bytes at a time"
    assert re.search(r"\bLDS(\.64|M)", made.code), "weights are not read from there 8 bytes or more at a time"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_no_register_is_written_while_wgmma_reads_it(product, dtype):
    products = 0
    for work in table("sm_90"):
        found, wrong = hazards(product("sm_90", dtype, work).code)
        products += found
        assert not wrong, f"{work}: {wrong[:3]}; set TRITON_PTXAS_PATH to a ptxas of 13.3 or later"
    assert products, "no tile of the table uses wgmma any more: this test looks at nothing"


def test_the_search_for_hazards_finds_one(product):
    """The real code with one instruction put right after a product."""
    lines = product("sm_90", "fp16", table("sm_90")[-1]).code.splitlines()
    at = next(i for i, line in enumerate(lines) if "HGMMA" in line and re.search(r"R\d+, R\d+, gdesc", line))
    left = int(re.search(r"R\d+, R(\d+), gdesc", lines[at])[1])
    for register, wrong in ((left, 1), (left + 3, 1), (left - 1, 0), (left + 4, 0)):
        doctored = [*lines[: at + 1], f"        /*0000*/   IADD3 R{register}, R1, R2, RZ ;", *lines[at + 1 :]]
        assert len(hazards("\n".join(doctored))[1]) == wrong


def test_small_batches_leave_wgmma_alone(product):
    """Up to 16 tokens `mma.sync` does as well, and needs neither waits nor a ptxas without that fault."""
    if Version(triton.__version__) >= Version("3.9"):
        pytest.skip("takes wgmma for 8 tokens, and has a ptxas without the fault")
    for work in table("sm_90")[:2]:
        names = {name_of(text) for text in main_loop(product("sm_90", "fp16", work).code)}
        assert "HMMA" in names and "HGMMA" not in names


def test_amd_uses_its_matrix_cores(product):
    for work in worth_a_look("cdna"):
        assert "v_mfma" in product("gfx942", "fp16", work).code


@pytest.mark.parametrize("target", TARGETS.values())
def test_dequantize_spills_nothing(tmp_path, target):
    from awq_core.kernels.triton.dequantize import dequantize_kernel

    made = compiled(dequantize_kernel, target, "bf16", {"GROUP": 32}, warps=4, stages=1, folder=tmp_path)
    assert made.spilled == 0


# -- the rest of a decoder block --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values())
@pytest.mark.parametrize("width", [4096, 32768])
def test_the_norm_spills_nothing(tmp_path, target, width):
    from awq_core.kernels.triton.norm import rms_norm_kernel, warps_for

    constants = {"WIDTH": width, "OFFSET": False, "BY_HAND": False}
    made = compiled(rms_norm_kernel, target, "bf16", constants, warps=warps_for(width), stages=3, folder=tmp_path)
    assert made.spilled == 0
    assert not target.startswith("sm_") or re.search(r"LDG\S*\.128", made.code), "a row is not read 16 bytes at a time"


@pytest.mark.parametrize("target", TARGETS.values())
@pytest.mark.parametrize(("width", "turning"), [(128, 128), (80, 32)])
def test_rotary_spills_nothing(tmp_path, target, width, turning):
    from awq_core.kernels.triton.rotary import HEADS, rotary_kernel

    constants = {"D": width, "R": turning, "WIDTH": 128, "HEADS": HEADS, "BY_HAND": False}
    assert compiled(rotary_kernel, target, "bf16", constants, warps=2, stages=3, folder=tmp_path).spilled == 0


@pytest.mark.parametrize("target", TARGETS.values())
@pytest.mark.parametrize(
    ("heads", "width", "changed"),
    [
        (4, 64, {}),
        (8, 128, {}),
        (8, 128, {"SPLIT": 1, "mask_ptr": None}),
        (1, 80, {"CAPPED": True}),
        (40, 256, {}),
    ],
    ids=str,
)
def test_attention_spills_nothing(tmp_path, target, heads, width, changed):
    from awq_core.kernels.triton.attention import STAGES, WARPS, attention_kernel, sizes

    padded, rows, cells = sizes(heads, width)
    constants = {"D": width, "WIDTH": padded, "ROWS": rows, "CELLS": cells, "SPLIT": 8, "CAPPED": False}
    constants |= {"BY_HAND": False} | changed
    made = compiled(attention_kernel, target, "bf16", constants, warps=WARPS, stages=STAGES, folder=tmp_path)
    assert made.spilled == 0, f"{made.spilled} spilled with {made.registers} registers"
    assert ("HMMA" if target.startswith("sm_") else "v_mfma") in made.code
    assert "HGMMA" not in made.code, "wgmma, which an old ptxas gets wrong"
    assert not target.startswith("sm_") or re.search(r"LDGSTS\S*\.128", made.code), "the cache is not read ahead"
