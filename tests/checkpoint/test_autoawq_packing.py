"""The packing, against a second implementation: tensors that AutoAWQ 0.2.9 itself packed and dequantized.

The fixture holds, for two shapes, random codes, zero points and scales, what `WQLinear_GEMM.from_linear` made of them,
and what `dequantize_gemm` read back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from awq_core.checkpoint.pack import PackedLinear, dequantize, pack_linear, unpack

FIXTURE = Path(__file__).parent / "fixtures" / "autoawq-0.2.9-gemm.safetensors"


@pytest.fixture(params=["128x32g64", "96x64g32"])
def theirs(request):
    tensors = load_file(FIXTURE)
    return {
        name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == request.param
    }


def test_we_read_what_autoawq_wrote(theirs):
    assert torch.equal(unpack(theirs["qweight"]), theirs["codes"])
    assert torch.equal(unpack(theirs["qzeros"]), theirs["zeros"])
    packed = PackedLinear(theirs["qweight"], theirs["qzeros"], theirs["scales"])
    torch.testing.assert_close(dequantize(packed), theirs["dequantized"].T, rtol=1e-6, atol=1e-8)


def test_we_write_what_autoawq_wrote(theirs):
    packed = pack_linear(theirs["codes"].T, theirs["scales"].T.float(), theirs["zeros"].T, torch.float16)
    assert torch.equal(packed.qweight, theirs["qweight"])
    assert torch.equal(packed.qzeros, theirs["qzeros"])
    assert torch.equal(packed.scales, theirs["scales"])
