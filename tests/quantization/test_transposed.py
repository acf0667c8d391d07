"""Weights that are [in, out] on disk: the replacement of `Conv1D`, and what is read and written."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config
from transformers.pytorch_utils import Conv1D

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError
from awq_core.modules import linear_conv1d
from awq_core.quantization.materialise import Materialiser
from awq_core.skeleton import build_skeleton, checkpoint_names, transposed_names
from awq_core.testing import save_tiny

TINY = GPT2Config(n_embd=64, n_inner=96, n_layer=1, n_head=4, vocab_size=128, bos_token_id=None, eos_token_id=None)
C_FC = "transformer.h.0.mlp.c_fc.weight"  # 64 inputs, 96 outputs


def test_conv1d_becomes_a_linear_of_the_same_function(generator):
    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 3)).eval()
    plain, x = model[1], torch.randn(5, 4, generator=generator)
    with torch.no_grad():
        model[0].bias.copy_(torch.randn(6, generator=generator))
        before = model(x)
        assert linear_conv1d(model)
        torch.testing.assert_close(model(x), before)
    assert model[0].weight.shape == (6, 4) and model[0].weight.is_contiguous() and not model[0].training
    assert model[1] is plain and transposed_names(model) == {"0.weight"}
    assert not linear_conv1d(model)


@pytest.fixture
def source(tmp_path):
    """A reader of a saved model, the model, and a skeleton with its linears."""
    model = save_tiny(TINY, tmp_path)
    skeleton = build_skeleton(TINY)
    assert linear_conv1d(skeleton)
    with CheckpointReader(tmp_path) as reader:
        names = checkpoint_names(skeleton, reader.names)
        yield Materialiser(reader, skeleton, names, device=torch.device("cpu"), dtype=torch.float32), model


def test_weights_are_turned_when_they_are_read(source):
    materialiser, model = source
    materialiser.verify(["transformer.h.0"])
    block = materialiser.model.get_submodule("transformer.h.0")
    with materialiser.filled(block, "transformer.h.0"):
        weight = block.mlp.c_fc.weight
        assert torch.equal(weight, model.get_parameter(C_FC).T) and weight.shape == (96, 64)
        assert torch.equal(materialiser.turned(C_FC, weight), model.get_parameter(C_FC))
        assert torch.equal(block.ln_1.weight, model.get_parameter("transformer.h.0.ln_1.weight"))


def test_a_weight_that_is_turned_on_disk_already_is_refused(source):
    materialiser, _ = source
    block = materialiser.model.get_submodule("transformer.h.0.mlp")
    block.c_fc = nn.Linear(64, 96, device="meta")
    other = Materialiser(
        materialiser.reader, materialiser.model, materialiser.names, device=torch.device("cpu"), dtype=torch.float32
    )
    with pytest.raises(CheckpointError, match=r"c_fc.weight has shape \(64, 96\), the configuration says \(96, 64\)"):
        other.verify(["transformer.h.0"])
