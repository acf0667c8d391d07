"""Stacked experts read one by one: every layout against slices of the stack, and renamed stacks."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import conversion_mapping

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.stacks import Piece, unstacked
from awq_core.errors import CheckpointError, NumericsError
from awq_core.modules import unstack_experts

E, H, INNER = 3, 8, 6


class Experts(nn.Module):
    """A stack as transformers has it."""

    def __init__(self, turned, interleaved, bias):
        super().__init__()
        self.is_transposed, self.is_concatenated, self.has_bias = turned, not interleaved, bias
        shapes = {"gate_up_proj": (E, 2 * INNER, H), "down_proj": (E, H, INNER)}
        for name, (count, rows, columns) in shapes.items():
            shape = (count, columns, rows) if turned else (count, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(count, rows)))
        self.act_fn = nn.SiLU()


class Model(nn.Module):
    base_model_prefix = ""

    def __init__(self, experts):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts
        self.norm = nn.LayerNorm(H)


@pytest.fixture(params=[(t, i, b) for t in (False, True) for i in (False, True) for b in (False, True)], ids=str)
def stacked(request, tmp_path, monkeypatch):
    """(reader of a saved model, the view of it, the model as it was saved, the layout)"""
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [])
    model = Model(Experts(*request.param))
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert unstack_experts(model, "mlp.experts")
    with CheckpointReader(tmp_path) as reader:
        yield reader, unstacked(reader, model), tensors, request.param


def expected(tensors, layout, expert, name):
    """The weight of one expert's linear and its bias, cut out by hand."""
    turned, interleaved, bias = layout
    stack = "down_proj" if name == "down_proj" else "gate_up_proj"
    weight = tensors[f"mlp.experts.{stack}"][expert]
    weight = weight.T if turned else weight
    rows = list(range(len(weight)))
    if stack == "gate_up_proj":
        up = name == "up_proj"
        rows = rows[int(up) :: 2] if interleaved else rows[INNER:] if up else rows[:INNER]
    return weight[rows], tensors[f"mlp.experts.{stack}_bias"][expert][rows] if bias else None


def test_every_piece_is_read(stacked):
    reader, view, tensors, layout = stacked
    assert not [name for name in view.names if name.endswith(("gate_up_proj", "_proj_bias")) or name not in view]
    assert len(view.names) == 2 + E * 3 * (1 + layout[2])
    assert view.total_bytes == sum(view.nbytes(name) for name in view.names) == reader.total_bytes
    for expert in range(E):
        for name in ("gate_proj", "up_proj", "down_proj"):
            base = f"mlp.experts.{expert}.{name}"
            for leaf, want in zip(("weight", "bias"), expected(tensors, layout, expert, name), strict=True):
                if want is None:
                    assert f"{base}.{leaf}" not in view
                    continue
                got = view.tensor(f"{base}.{leaf}")
                assert torch.equal(got, want) and got.is_contiguous()
                assert got.untyped_storage().nbytes() == got.nbytes  # nothing larger is kept alive
                assert view.shape(f"{base}.{leaf}") == tuple(want.shape)
                out = torch.empty(want.shape, dtype=torch.bfloat16)
                assert torch.equal(view.read_into(f"{base}.{leaf}", out), want.bfloat16())
            rows = view.tensor(f"{base}.weight", rows=(1, 3), dtype=torch.float16)
            assert torch.equal(rows, expected(tensors, layout, expert, name)[0][1:3].half())


def test_everything_else_is_as_it_was(stacked):
    _, view, tensors, _ = stacked
    assert torch.equal(view.tensor("norm.weight"), tensors["norm.weight"])
    assert torch.equal(view.read_into("norm.bias", torch.empty(H)), tensors["norm.bias"])
    assert view.dtype("mlp.experts.0.up_proj.weight") is view.main_dtype is torch.float32
    with pytest.raises(CheckpointError, match="has no tensor"):
        view.tensor("mlp.experts.9.up_proj.weight")


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_stack_turned_on_disk_alone_is_turned_back(tmp_path, monkeypatch, interleaved):
    """transformers turns some stacks while loading, where their shapes say so."""
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [])
    model = Model(Experts(False, interleaved, False))
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    on_disk = {name: value.mT.contiguous() if value.ndim == 3 else value for name, value in tensors.items()}
    save_file(on_disk, tmp_path / "model.safetensors")
    unstack_experts(model, "mlp.experts")
    with CheckpointReader(tmp_path) as reader:
        view = unstacked(reader, model)
        for expert in range(E):
            for name in ("gate_proj", "up_proj", "down_proj"):
                got = view.tensor(f"mlp.experts.{expert}.{name}.weight")
                assert torch.equal(got, expected(tensors, (False, interleaved, False), expert, name)[0])
                assert view.shape(f"mlp.experts.{expert}.{name}.weight") == tuple(got.shape)


def test_a_checkpoint_of_single_experts_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [])
    model = Model(Experts(False, False, False))
    unstack_experts(model, "mlp.experts")
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert unstacked(reader, model) is reader


def test_only_the_expert_that_is_read_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [])
    model = Model(Experts(False, False, False))
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tensors["mlp.experts.down_proj"][1, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    unstack_experts(model, "mlp.experts")
    with CheckpointReader(tmp_path) as reader:
        view = unstacked(reader, model)
        assert torch.isfinite(view.tensor("mlp.experts.0.down_proj.weight")).all()
        with pytest.raises(NumericsError, match="holds NaN"):
            view.tensor("mlp.experts.1.down_proj.weight")


def test_shapes_of_pieces():
    assert Piece("s", 0, 1, None, 2).shape((4, 7, 5)) == (3, 5)
    assert Piece("s", 0, 0, 3, turned=True).shape((4, 7, 5)) == (3, 7)
    assert Piece("s", 0, 2).shape((4, 7)) == (5,)
