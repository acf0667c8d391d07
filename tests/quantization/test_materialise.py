"""What a skeleton gets from disk: buffers that are stored beside the weights, and nothing else's."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError
from awq_core.quantization.materialise import Materialiser


class Multiplied(nn.Module):
    """A linear whose output is multiplied by a stored number, and a table that no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False, device="meta")
        self.register_buffer("factor", torch.ones(1))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def materialiser(reader, model):
    return Materialiser(reader, model, {name: name for name in reader.names}, device="cpu", dtype=torch.float32)


def test_stored_buffers_are_read_and_others_stay(tmp_path):
    stored = {"linear.weight": torch.randn(4, 4), "factor": torch.tensor([0.25], dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")
    model = Multiplied()
    with CheckpointReader(tmp_path) as reader:
        materialiser(reader, model)
    assert model.factor.dtype == torch.float32 and float(model.factor) == 0.25
    assert torch.equal(model.table, torch.arange(3.0)) and model.linear.weight.is_meta


def test_a_stored_buffer_of_another_shape_is_refused(tmp_path):
    save_file({"linear.weight": torch.ones(4, 4), "factor": torch.ones(2)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=r"factor has shape \(2,\)"):
        materialiser(reader, Multiplied())
