"""Layouts of other tools: every integer and scale arrives unchanged; what has no AWQ form is refused by name.

The layouts are packed here number by number, from their descriptions.
"""

import pytest
import torch
from safetensors.torch import save_file

from awq_core.checkpoint.foreign import logical_names, packed_names, read_packed, tensor_names
from awq_core.checkpoint.format import Settings
from awq_core.checkpoint.pack import dequantize, unpack
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError, NumericsError

NAME = "model.layers.0.q"


def words(matrix):
    """[rows, n] of 0..15 to int32 [rows, ceil(n / 8)]: eight neighbours a word, the first in its lowest bits."""
    rows = []
    for row in matrix.tolist():
        row = row + [0] * (-len(row) % 8)
        values = [sum(row[8 * c + i] << 4 * i for i in range(8)) for c in range(len(row) // 8)]
        rows.append([value - (1 << 32 if value >= 1 << 31 else 0) for value in values])
    return torch.tensor(rows, dtype=torch.int32)


class Linear:
    """Random codes [out, in], and zero points and scales [out, groups] that include the extremes."""

    def __init__(self, out=16, inputs=64, group=32, symmetric=False, scales_dtype=torch.bfloat16, lowest=0):
        generator = torch.Generator().manual_seed(out * inputs + group)
        groups = 1 if group == -1 else inputs // group
        self.codes = torch.randint(0, 16, (out, inputs), generator=generator)
        self.zeros = torch.randint(lowest, 16, (out, groups), generator=generator)
        self.codes[0, :2], self.zeros[0, 0], self.zeros[1, 0] = torch.tensor([0, 15]), 15, lowest
        if symmetric:
            self.zeros[:] = 8
        self.scales = (torch.rand(out, groups, generator=generator) + 0.01).to(scales_dtype)
        self.scales[2, 0] = 0

    def weight(self):
        out, inputs = self.codes.shape
        group = inputs // self.zeros.shape[1]
        made = torch.empty(out, inputs)
        for o in range(out):
            for i in range(inputs):
                code, zero = int(self.codes[o, i]), int(self.zeros[o, i // group])
                made[o, i] = (code - zero) * self.scales[o, i // group].float()
        return made

    def gptq(self, less=0):
        order = torch.arange(self.codes.shape[1], dtype=torch.int32) // (self.codes.shape[1] // self.zeros.shape[1])
        return {
            "qweight": words(self.codes).t().contiguous(),
            "qzeros": words((self.zeros - less).t()),
            "scales": self.scales.t().contiguous(),
            "g_idx": order,
        }

    def pack_quantized(self, zeros=True):
        stored = {"weight_zero_point": words(self.zeros.t()).t().contiguous()} if zeros else {}
        return {
            "weight_packed": words(self.codes),
            "weight_scale": self.scales,
            "weight_shape": torch.tensor(self.codes.shape),
            **stored,
        }


@pytest.fixture
def read(tmp_path):
    """read(tensors, settings, shape): the linear of a folder with these tensors."""

    def read(parts, settings, shape=None):
        save_file({f"{NAME}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
        with CheckpointReader(tmp_path) as reader:
            return read_packed(reader, NAME, settings, shape=shape)

    return read


def same(packed, linear):
    assert torch.equal(unpack(packed.qweight).t(), linear.codes.to(torch.uint8))
    assert torch.equal(unpack(packed.qzeros).t(), linear.zeros.to(torch.uint8))
    assert torch.equal(packed.scales.t(), linear.scales) and packed.scales.dtype == linear.scales.dtype
    assert torch.equal(dequantize(packed), linear.weight())
    assert all(tensor.is_contiguous() for tensor in (packed.qweight, packed.qzeros, packed.scales))
    return True


SIZES = [(16, 64, 32), (8, 8, 8), (40, 96, 16), (24, 48, -1), (8, 64, 64), (272, 16, 8)]


@pytest.mark.parametrize(("out", "inputs", "group"), SIZES)
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "pack-quantized"])
def test_every_number_arrives(read, layout, out, inputs, group, scales):
    settings = Settings(group_size=group, version=layout)
    # Version 1 has no way to say 0: see below.
    linear = Linear(out, inputs, group, scales_dtype=scales, lowest=int(layout == "gptq"))
    parts = linear.pack_quantized() if layout == "pack-quantized" else linear.gptq(less=int(layout == "gptq"))
    assert same(read(parts, settings, (out, inputs)), linear)
    assert same(read(parts, settings), linear)


@pytest.mark.parametrize("inputs", [20, 33, 7])
def test_rows_that_end_inside_a_word(read, inputs):
    linear = Linear(16, inputs, -1)
    assert same(read(linear.pack_quantized(), Settings(group_size=-1, version="pack-quantized")), linear)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "pack-quantized"])
def test_symmetric_weights_have_the_zero_point_8(read, layout):
    linear, settings = Linear(symmetric=True), Settings(group_size=32, zero_point=False, version=layout)
    parts = linear.gptq(less=int(layout == "gptq"))
    if layout == "pack-quantized":
        parts = linear.pack_quantized(zeros=False)
        assert same(read(linear.pack_quantized(zeros=True), settings), linear)
    assert same(read(parts, settings), linear)


def test_zero_points_of_old_releases_lie_unpacked(read):
    linear = Linear()
    parts = linear.pack_quantized() | {"weight_zero_point": (linear.zeros - 8).to(torch.int8)}
    assert same(read(parts, Settings(group_size=32, version="pack-quantized")), linear)


def test_a_linear_may_have_another_declared_group_size(read):
    settings = Settings(group_size=64, version="pack-quantized", other_group_sizes=(16, 32))
    assert same(read(Linear().pack_quantized(), settings), Linear())


def test_float32_scales_that_16_bits_hold(read):
    for dtype in (torch.float16, torch.bfloat16):
        linear = Linear(scales_dtype=dtype)
        parts = linear.pack_quantized() | {"weight_scale": linear.scales.float()}
        packed = read(parts, Settings(group_size=32, version="pack-quantized"))
        assert torch.equal(dequantize(packed), linear.weight())


def test_g_idx_may_be_left_out(read):
    linear = Linear()
    parts = linear.gptq()
    parts.pop("g_idx")
    assert same(read(parts, Settings(group_size=32, version="gptq_v2")), linear)


def test_names_of_every_layout(tmp_path):
    settings = Settings(group_size=32, version="pack-quantized")
    parts = {f"{NAME}.{part}": tensor for part, tensor in Linear().pack_quantized().items()}
    save_file({**parts, f"{NAME}.bias": torch.ones(16), "norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert packed_names(reader.names, settings) == [NAME]
        assert logical_names(reader.names, settings) == {
            f"{NAME}.weight": True,
            f"{NAME}.bias": False,
            "norm.weight": False,
        }
        assert set(tensor_names(reader, NAME, settings)) == set(parts)
        assert packed_names(reader.names, None) == []


# -- refused ----------------------------------------------------------------------------------------------------------


def shuffled(parts):
    parts["g_idx"] = parts["g_idx"].flip(0)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (shuffled, ("out of order", "act-order")),
        (lambda p: p.update(g_idx=p["g_idx"][:8].clone()), ("out of order",)),
        (lambda p: p.pop("qzeros"), (f"{NAME}.qzeros",)),
        (lambda p: p.update(qweight=p["qweight"].t().contiguous()), ("qweight has shape (16, 8)", "(any, 16)")),
        (lambda p: p.update(qweight=p["qweight"].long()), ("qweight is torch.int64",)),
        (lambda p: p.update(qzeros=p["qzeros"][:1].clone()), ("qzeros has shape (1, 2)", "(2, 2)")),
        (lambda p: p.update(scales=p["scales"][0].clone()), ("scales has shape (16,)",)),
        (lambda p: p.update(scales=torch.rand(2, 16)), ("float32", "16 bits")),
        (lambda p: p.update(scales=p["scales"].int()), ("scales is torch.int32",)),
        (lambda p: p.update(scales=p["scales"][:0].clone(), qzeros=p["qzeros"][:0].clone()), ("0 groups",)),
        (lambda p: p.update(scales=p["scales"].repeat(2, 1), qzeros=p["qzeros"].repeat(2, 1)), ("4 groups", "32")),
    ],
)
def test_gptq_tensors_that_do_not_fit(read, edit, said, one_line):
    parts = Linear().gptq()
    if edit is not shuffled and "4 groups" in said:
        parts.pop("g_idx")
    edit(parts)
    with pytest.raises(CheckpointError) as caught:
        read(parts, Settings(group_size=32, version="gptq_v2"), (16, 64))
    one_line(caught.value, NAME, *said)


def test_version_1_cannot_say_a_zero_point_of_0_or_16(read, one_line):
    parts = Linear(lowest=1).gptq(less=1)
    parts["qzeros"][0, 0] |= 0xF  # the first zero point of the first group
    with pytest.raises(CheckpointError) as caught:
        read(parts, Settings(group_size=32, version="gptq"))
    one_line(caught.value, NAME, "stored as 15", "gptq_v2")
    assert int(unpack(read(parts, Settings(group_size=32, version="gptq_v2")).qzeros)[0, 0]) == 15


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda p: p.pop("weight_zero_point"), ("weight_zero_point is missing",)),
        (lambda p: p.pop("weight_scale"), ("weight_scale",)),
        (lambda p: p.pop("weight_shape"), ("weight_shape",)),
        (lambda p: p.update(weight_shape=torch.tensor([16, 128])), ("weight_packed has shape (16, 8)", "(16, 16)")),
        (lambda p: p.update(weight_shape=torch.tensor([16, 63])), ("63 input features",)),
        (lambda p: p.update(weight_shape=torch.tensor([16])), ("weight_shape has shape (1,)",)),
        (
            lambda p: p.update(weight_shape=torch.tensor([16, 0]), weight_packed=p["weight_packed"][:, :0].clone()),
            ("0 input features",),
        ),
        (lambda p: p.update(weight_packed=p["weight_packed"].long()), ("weight_packed is torch.int64",)),
        (lambda p: p.update(weight_scale=p["weight_scale"].t().contiguous()), ("weight_scale has shape (2, 16)",)),
        (lambda p: p.update(weight_zero_point=p["weight_zero_point"].long()), ("weight_zero_point is torch.int64",)),
        (lambda p: p.update(weight_zero_point=p["weight_zero_point"].char()), ("weight_zero_point has shape (2, 2)",)),
        (lambda p: p.update(weight_zero_point=torch.full((16, 2), 8).char()), ("zero points outside", "-8 to 7")),
        (lambda p: p.update(weight_zero_point=torch.full((16, 2), -128).char()), ("zero points outside", "-8 to 7")),
        (lambda p: p.update(weight_zero_point=torch.full((16, 2), 127).char()), ("zero points outside", "-8 to 7")),
        (lambda p: p.update(weight_g_idx=torch.arange(64).int() % 2), ("out of order",)),
    ],
)
def test_compressed_tensors_that_do_not_fit(read, edit, said, one_line):
    parts = Linear().pack_quantized()
    edit(parts)
    with pytest.raises(CheckpointError) as caught:
        read(parts, Settings(group_size=32, version="pack-quantized"), (16, 64))
    one_line(caught.value, NAME, *said)


@pytest.mark.parametrize("layout", ["gptq_v2", "pack-quantized"])
def test_the_configuration_is_not_overruled(read, layout, one_line):
    linear = Linear()
    parts = linear.gptq() if layout == "gptq_v2" else linear.pack_quantized()
    for settings, shape, said in (
        (Settings(group_size=16, version=layout), None, ("2 groups", "groups of 16")),
        (Settings(group_size=32, version=layout), (16, 128), ("16 x 64", "16 x 128")),
        (Settings(group_size=32, version=layout), (64, 16), ("16 x 64", "64 x 16")),
        (Settings(group_size=32, version=layout, zero_point=False), None, ("not 8", "symmetric")),
    ):
        with pytest.raises(CheckpointError) as caught:
            read(parts, settings, shape)
        one_line(caught.value, NAME, *said)


def test_twelve_outputs_do_not_fill_words(read, one_line):
    with pytest.raises(CheckpointError) as caught:
        read(Linear(out=12).pack_quantized(), Settings(group_size=32, version="pack-quantized"))
    one_line(caught.value, NAME, "12 output features")


def test_nan_in_a_scale_is_named(read, one_line):
    parts = Linear().pack_quantized()
    parts["weight_scale"][3, 1] = float("nan")
    with pytest.raises(NumericsError) as caught:
        read(parts, Settings(group_size=32, version="pack-quantized"))
    one_line(caught.value, "weight_scale", "NaN")
