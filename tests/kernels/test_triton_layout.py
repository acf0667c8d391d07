"""Tiles of words of planes, against the table written down once more; and the bit arithmetic of the kernels on them."""

import pytest
import torch

from awq_core.checkpoint.pack import pack_linear, unpack
from awq_core.errors import CheckpointError
from awq_core.kernels.triton.layout import TiledWeight, interleave, tile, untile


@pytest.mark.parametrize(
    ("inputs", "outputs", "group"), [(128, 64, 128), (256, 72, 64), (96, 8, 32), (160, 136, -1), (32, 16, 32)]
)
def test_every_code_is_where_the_table_says(make, inputs, outputs, group):
    packed = make(inputs, outputs, group).packed
    weight = tile(packed)
    words, codes = weight.tiles.tolist(), unpack(packed.qweight).T.tolist()
    assert weight.tiles.dtype == torch.int16 and weight.tiles.shape == (-(-outputs // 64), -(-inputs // 128), 64, 32)
    for n in range(outputs):
        for k in range(inputs):
            word = words[n // 64][k // 128][n % 64][k % 32]
            assert (word >> (4 * (k % 128 // 32))) % 16 == codes[n][k]
    whole = untile(weight)
    assert torch.equal(whole[:outputs, :inputs], torch.tensor(codes, dtype=torch.uint8))
    assert not whole[outputs:].any() and not whole[:, inputs:].any()


@pytest.mark.parametrize(
    ("inputs", "group", "said", "rows"),
    [(256, 128, 128, 2), (192, 64, 64, 4), (96, 32, 32, 4), (96, -1, 0, 1), (128, 128, 0, 1), (64, 32, 32, 4)],
)
def test_scales_and_zeros_lie_as_in_the_checkpoint(make, inputs, group, said, rows):
    packed = make(inputs, 24, group).packed
    weight = tile(packed)
    groups = len(packed.scales)
    assert (weight.group, weight.out_features, len(weight.scales)) == (said, 24, rows)
    assert torch.equal(weight.scales[:groups], packed.scales) and not weight.scales[groups:].any()
    assert torch.equal(weight.zeros[:groups], unpack(packed.qzeros)) and weight.zeros.dtype == torch.uint8


def test_a_weight_takes_four_bits_and_its_share_of_scales(make):
    weight = tile(make(1024, 64, 128).packed)
    bits = 8 * sum(tensor.nbytes for tensor in (weight.tiles, weight.scales, weight.zeros)) / (1024 * 64)
    assert bits == 4.1875
    assert all(tensor.is_contiguous() for tensor in (weight.tiles, weight.scales, weight.zeros))
    assert weight.tiles[0, 0].nbytes == 4096


def test_a_group_of_no_planes_is_refused(make):
    with pytest.raises(ValueError, match="groups of 16"):
        tile(make(64, 8, 16).packed)


def test_rows_of_gate_and_up_take_turns(make):
    gate, up = make(64, 24, 32, seed=1), make(64, 24, 32, seed=2)
    both = interleave(gate.packed, up.packed)
    for name in ("qweight", "qzeros"):
        codes = unpack(getattr(both, name))
        assert torch.equal(codes[:, ::2], unpack(getattr(gate.packed, name)))
        assert torch.equal(codes[:, 1::2], unpack(getattr(up.packed, name)))
    assert torch.equal(both.scales[:, ::2], gate.packed.scales) and torch.equal(both.scales[:, 1::2], up.packed.scales)


def test_only_what_the_format_can_hold_arrives_here():
    with pytest.raises(CheckpointError, match="12 output features"):
        tile(pack_linear(torch.zeros(12, 64), torch.ones(12, 1), torch.zeros(12, 1)))


# -- what one instruction makes of two words --------------------------------------------------------------------------

# dtype, plane -> shift, mask, magic, value of the magic; the table of `planes.py`
PLANES = {
    (torch.float16, 0): (0, 0x000F, 0x6400, 1024),
    (torch.float16, 1): (0, 0x00F0, 0x5400, 64),
    (torch.float16, 2): (8, 0x000F, 0x6400, 1024),
    (torch.float16, 3): (8, 0x00F0, 0x5400, 64),
    (torch.bfloat16, 0): (0, 0x000F, 0x4300, 128),
    (torch.bfloat16, 1): (4, 0x000F, 0x4300, 128),
    (torch.bfloat16, 2): (8, 0x000F, 0x4300, 128),
    (torch.bfloat16, 3): (12, 0x000F, 0x4300, 128),
}


def lop3(a, b, c, table):
    """PTX's `lop3.b32`: bit i of the table is the result for a, b, c = the bits of i, a highest."""
    result = torch.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            chosen = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result |= chosen
    return result & 0xFFFFFFFF


@pytest.mark.parametrize(("dtype", "plane"), PLANES)
def test_two_words_at_once_are_the_same_as_each_alone(dtype, plane):
    """The assembly works on 32 bits; what the shift carries from the upper word into the lower must not show."""
    shift, mask, magic, base = PLANES[dtype, plane]
    words = torch.arange(2**16)
    neighbours = words[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    pairs = words | neighbours << 16
    got = lop3(pairs >> shift, torch.tensor(mask * 0x10001), torch.tensor(magic * 0x10001), 0xEA)
    for word, bits in ((words, got & 0xFFFF), (neighbours, got >> 16)):
        signed = word.to(torch.int16)  # the twin's arithmetic: 16 bits with a sign
        assert torch.equal(((signed >> shift) & mask) | magic, bits.to(torch.int16))
        assert torch.equal(bits.to(torch.int16).view(dtype).double(), (base + (word >> 4 * plane & 15)).double())


@pytest.mark.parametrize(("dtype", "plane"), PLANES)
def test_codes_less_zero_points_are_exact(dtype, plane):
    base = PLANES[dtype, plane][3]
    codes, zeros = torch.arange(16), torch.arange(16)[:, None]
    difference = (base + codes).to(dtype) - (base + zeros).to(dtype)
    assert torch.equal(difference.long(), codes - zeros)


def test_a_weight_can_be_made_of_a_state(make):
    weight = tile(make(64, 8, 32).packed)
    assert TiledWeight(tiles=weight.tiles, scales=weight.scales, zeros=weight.zeros).group == 32
