"""Two quantized models compared: against numpy, against the functions for one model, and on weights made by hand."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from awq_core.checkpoint.format import quantization_config
from awq_core.checkpoint.pack import dequantize, pack_linear
from awq_core.errors import CheckpointError, ConfigError
from awq_core.evaluation import compare_models, compare_weights, divergence, perplexity
from awq_core.evaluation.blocks import block_paths
from awq_core.evaluation.paired import estimate, paired, perplexities

# -- statistics


def test_paired_statistics_are_numpys():
    a, b = np.array([0.31, 0.52, 0.11, 0.75]), np.array([0.30, 0.49, 0.13, 0.70])
    pair = paired(torch.tensor(a), torch.tensor(b))
    for found, values in ((pair.a, a), (pair.b, b), (pair.difference, a - b)):
        assert found.mean == pytest.approx(values.mean(), abs=1e-15)
        assert found.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(4), abs=1e-15)
    assert pair.difference.stderr < pair.a.stderr / 5  # what the pairing is for


def test_two_standard_errors_tell_apart():
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0])
    error = float(np.array(noise).std(ddof=1)) / 2
    zero = torch.zeros(4)
    assert paired(noise + 2.01 * error, zero).apart and paired(noise - 2.01 * error, zero).apart
    assert not paired(noise + 1.99 * error, zero).apart
    assert not paired(zero, zero).apart
    one = paired(torch.ones(1), torch.zeros(1))
    assert math.isnan(one.difference.stderr) and not one.apart
    with pytest.raises(ConfigError):
        paired(torch.ones(2), torch.ones(3))


def test_the_error_of_a_perplexity_is_that_of_many_texts():
    """The delta method against drawing windows over and over."""
    nll = np.random.default_rng(0).normal(2.0, 0.3, size=60)
    found = estimate(perplexities(torch.tensor(nll)))
    assert found.mean == pytest.approx(np.exp(nll.mean()))
    drawn = np.random.default_rng(1).choice(nll, size=(20_000, 60))
    assert found.stderr == pytest.approx(np.exp(drawn.mean(1)).std(), rel=0.05)


# -- models


@pytest.fixture(scope="module")
def near(model):
    """`model` with a little noise: a quantized one, as it were."""
    changed = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return changed


def test_it_agrees_with_the_functions_for_one_model(model, near, other, tokenizer, text):
    found = compare_models(model, near, other, tokenizer, text, window=8, block_windows=1)
    for candidate, kl, top1, fit in (
        (near, found.kl.a, found.agreement.a, found.perplexity.a),
        (other, found.kl.b, found.agreement.b, found.perplexity.b),
    ):
        apart = divergence(model, candidate, tokenizer, text, window=8)
        assert (kl.mean, kl.stderr) == pytest.approx((apart.kl_mean, apart.kl_stderr))
        assert top1.mean == pytest.approx(apart.top1_agreement)
        assert fit.mean == pytest.approx(perplexity(candidate, tokenizer, text, window=8).perplexity)
    assert found.original.mean == pytest.approx(perplexity(model, tokenizer, text, window=8).perplexity)
    assert (found.windows, found.window, found.tokens, found.block_windows) == (4, 8, 32, 1)
    assert found.closer == "a"


def test_swapped_models_mirror_the_result(model, near, other, tokenizer, text):
    one = compare_models(model, near, other, tokenizer, text, window=8)
    two = compare_models(model, other, near, tokenizer, text, window=8)
    for name in ("perplexity", "kl", "agreement"):
        left, right = getattr(one, name), getattr(two, name)
        assert (left.a, left.b) == (right.b, right.a)
        assert left.difference.mean == -right.difference.mean
        assert left.difference.stderr == right.difference.stderr
    assert [(block.a, block.b) for block in one.blocks] == [(block.b, block.a) for block in two.blocks]
    assert (one.closer, two.closer) == ("a", "b")


def test_the_original_itself_is_at_no_distance(model, tokenizer, text):
    twin = copy.deepcopy(model)
    found = compare_models(model, twin, twin, tokenizer, text, window=8)
    assert found.kl.a.mean == 0 and found.agreement.a.mean == 1 and found.closer is None
    assert [(block.name, block.a, block.b) for block in found.blocks] == [("model.layers.0", 0.0, 0.0)]


def test_block_errors_by_hand(model, near, tokenizer, text):
    """A llama of one block: what its block reads is the embedding, so A's block is run on that."""
    found = compare_models(model, near, model, tokenizer, text, window=8, max_windows=1)
    ids = torch.tensor([tokenizer(text)["input_ids"][:8]])
    model.eval()
    seen = {}
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.update(args=args, kwargs=kwargs, output=output), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        near.eval()
        wrong = near.model.layers[0](*seen["args"], **seen["kwargs"])
    right, wrong = (value if isinstance(value, torch.Tensor) else value[0] for value in (seen["output"], wrong))
    away = np.linalg.norm((wrong - right).numpy(), axis=-1) / np.linalg.norm(right.numpy(), axis=-1)
    (block,) = found.blocks
    assert block.a == pytest.approx(away.mean(), rel=1e-5) and block.a > 0 and block.b == 0


def test_the_original_may_have_another_dtype(model, near, tokenizer, text):
    half = copy.deepcopy(near).bfloat16()
    found = compare_models(model, near, half, tokenizer, text, window=8)
    assert found.blocks[0].b == pytest.approx(found.blocks[0].a, rel=0.2)


def test_modes_and_hooks_are_as_before(model, near, tokenizer, text):
    model.train()
    compare_models(model, near, near, tokenizer, text, window=8, max_windows=1)
    assert model.training and not model.model.layers[0]._forward_hooks


def test_blocks_can_be_left_out(model, near, tokenizer, text):
    assert compare_models(model, near, near, tokenizer, text, window=8, block_windows=0).blocks == ()
    with pytest.raises(ConfigError):
        compare_models(model, near, near, tokenizer, text, block_windows=-1)


def test_blocks_are_the_outermost_lists():
    tower = torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})
    for _ in range(2):
        experts = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
        tower["layers"].append(torch.nn.ModuleDict({"experts": experts}))
    assert block_paths(tower) == ["layers.0", "layers.1"]


# -- weights

OUT, IN, GROUP = 8, 64, 32


def folder(path, *, codes, scale, zero, names=("a",), group=GROUP, kind="tiny", norm=1.0):
    """A quantized folder of equal linears and one norm."""
    path.mkdir()
    section = quantization_config(group_size=group, modules_to_not_convert=[])
    (path / "config.json").write_text(json.dumps({"model_type": kind, "quantization_config": section}))
    packed = pack_linear(codes, scale, zero)
    tensors = {"norm.weight": torch.full((4,), norm)}
    for name in names:
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"{name}.{part}"] = getattr(packed, part).clone()
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def values():
    torch.manual_seed(3)
    codes = torch.randint(0, 15, (OUT, IN))
    return {"codes": codes, "scale": torch.rand(OUT, 2) + 0.5, "zero": torch.randint(0, 15, (OUT, 2))}


def test_what_differs_is_counted(tmp_path, values):
    codes, scale, zero = (value.clone() for value in values.values())
    codes[0, :5] += 1
    codes[7, 63] += 1
    scale[1, 0] *= 2
    zero[1, 0] += 1  # the same group
    zero[2, 1] += 1
    first = folder(tmp_path / "first", **values)
    second = folder(tmp_path / "second", codes=codes, scale=scale, zero=zero)
    seen = []
    found = compare_weights(first, second, progress=lambda done, total: seen.append((done, total)))
    (linear,) = found.linears
    assert (linear.name, linear.parameters, seen) == ("a", OUT * IN, [(1, 1)])
    assert linear.codes == found.codes == 6 / (OUT * IN)
    assert linear.groups == found.groups == 2 / (OUT * 2)
    mine, theirs = (
        (q.numpy() - z.numpy().repeat(GROUP, 1)) * s.half().double().numpy().repeat(GROUP, 1)
        for q, s, z in ((values["codes"], values["scale"], values["zero"]), (codes, scale, zero))
    )
    norms = (np.linalg.norm(mine) ** 2 + np.linalg.norm(theirs) ** 2) / 2
    assert linear.weight == pytest.approx(np.linalg.norm(mine - theirs) / np.sqrt(norms), rel=1e-5)
    assert not found.equal
    mirrored = compare_weights(second, first)
    assert mirrored.linears[0].weight == pytest.approx(linear.weight) and mirrored.codes == found.codes


def test_equal_folders(tmp_path, values):
    first, second = folder(tmp_path / "first", **values), folder(tmp_path / "second", **values)
    found = compare_weights(first, second)
    assert found.equal and found.codes == found.groups == found.linears[0].weight == 0
    changed = folder(tmp_path / "third", **values, norm=2.0)
    found = compare_weights(first, changed)
    assert found.others == ("norm.weight",) and not found.equal


def test_quantized_in_one_only(tmp_path, values):
    first = folder(tmp_path / "first", **values, names=("a", "b"))
    second = folder(tmp_path / "second", **values, names=("a", "c"))
    found = compare_weights(first, second)
    assert [linear.name for linear in found.linears] == ["a"]
    assert (found.only_a, found.only_b, found.equal) == (("b",), ("c",), False)
    with pytest.raises(CheckpointError, match="no quantized linear in common"):
        compare_weights(first, folder(tmp_path / "third", **values, names=("d",)))


def test_other_group_sizes_compare_weights_only(tmp_path, values):
    first = folder(tmp_path / "first", **values)
    whole = {"scale": values["scale"][:, :1], "zero": values["zero"][:, :1]}
    second = folder(tmp_path / "second", codes=values["codes"], **whole, group=-1)
    found = compare_weights(first, second)
    assert found.group_sizes == (GROUP, -1) and found.codes is None and found.groups is None
    left, right = (
        dequantize(pack_linear(values["codes"], one["scale"], one["zero"])).numpy() for one in (values, whole)
    )
    norms = (np.linalg.norm(left) ** 2 + np.linalg.norm(right) ** 2) / 2
    assert found.linears[0].weight == pytest.approx(np.linalg.norm(left - right) / np.sqrt(norms), rel=1e-5)


def test_what_cannot_be_compared(tmp_path, values, llama_source, quantized_llama, one_line):
    first = folder(tmp_path / "first", **values)
    with pytest.raises(CheckpointError) as caught:
        compare_weights(first, folder(tmp_path / "second", **values, kind="big"))
    one_line(caught.value, "is a tiny", "a big")
    with pytest.raises(CheckpointError) as caught:
        compare_weights(quantized_llama, llama_source)
    one_line(caught.value, llama_source, "not quantized", "--reference")
    wide = {name: value.repeat(2, 1) for name, value in values.items()}
    with pytest.raises(CheckpointError) as caught:
        compare_weights(first, folder(tmp_path / "third", **wide))
    one_line(caught.value, "a is 8 x 64", "16 x 64")
