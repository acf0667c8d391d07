"""Which backend runs a linear: by device, format, dtype, shape and priority; or the one AWQ_KERNEL names."""

import sys
import types

import pytest
import torch

from awq_core import kernels
from awq_core.errors import ConfigError
from awq_core.hooks import Architecture, KernelBackend, LayerStack, hookimpl
from awq_core.hooks.manager import PluginManager
from awq_core.kernels.cpu import build
from awq_core.kernels.cpu.int4pack import Int4PackKernel
from awq_core.kernels.cpu.w4a16 import W4A16Kernel
from awq_core.kernels.reference import ReferenceKernel
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load


class Doubling(ReferenceKernel):
    """The reference times two: whoever ran it can be told from the result."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def linear(self, x, state):
        return 2 * super().linear(x, state)


class Picky(ReferenceKernel):
    def unsupported(self, packed, dtype):
        return "not on Fridays"


def explode():
    raise ImportError("no compiler\nhere")


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """A machine without the C++ kernel, whatever this one has."""
    monkeypatch.setattr(build, "library", lambda: "no C++ compiler: install g++")


@pytest.fixture
def library(monkeypatch):
    """A machine with it, as far as choosing goes."""
    monkeypatch.setattr(build, "library", lambda: build.Library(None, None, False, "g++"))


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """Factories are named as strings, so they must be importable; none may outlive its test."""
    made = types.ModuleType("awq_test_kernels")
    made.Doubling, made.Picky, made.explode = Doubling, Picky, explode
    monkeypatch.setitem(sys.modules, "awq_test_kernels", made)
    monkeypatch.setattr(kernels, "_MADE", {})
    monkeypatch.setattr(Doubling, "made", 0)


def backend(name="fast", attribute="Doubling", **fields):
    fields = {"formats": ("gemm",), "devices": ("cpu",), "priority": 100, **fields}
    return KernelBackend(name=name, factory=f"awq_test_kernels:{attribute}", **fields)


def choose(packed, dtype, *extra, device="cpu"):
    return kernels.choose(packed, dtype, device=device, backends=(*kernels.KERNEL_BACKENDS, *extra))


@pytest.fixture
def packed(make):
    return make(64, 16, 32).packed


@pytest.mark.parametrize(
    ("dtype", "name", "kind"),
    [
        (torch.bfloat16, "int4pack", Int4PackKernel),
        (torch.float32, "reference", ReferenceKernel),
        (torch.float16, "reference", ReferenceKernel),
    ],
)
def test_without_a_compiler_it_is_torchs_or_the_reference(packed, dtype, name, kind):
    found = choose(packed, dtype)
    assert (found.name, type(found.kernel)) == (name, kind)
    assert kernels.instance(found.factory) is found.kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_compiled_one_comes_first(packed, library, dtype):
    found = choose(packed, dtype)
    assert (found.name, type(found.kernel)) == ("cpu", W4A16Kernel)


def test_where_the_compiled_one_is_forced_and_missing_it_says_why(packed, monkeypatch, one_line):
    monkeypatch.setenv("AWQ_KERNEL", "cpu")
    with pytest.raises(ConfigError) as caught:
        choose(packed, torch.bfloat16)
    one_line(caught.value, "cpu: no C++ compiler: install g++")


def test_a_dtype_no_fast_one_knows_goes_to_the_reference(packed, library):
    assert choose(packed, torch.float64).name == "reference"


def test_a_shape_the_fast_one_refuses_goes_to_the_reference(make):
    assert choose(make(64, 24, 32).packed, torch.bfloat16)[0] == "reference"


def test_the_highest_priority_wins(packed):
    assert choose(packed, torch.bfloat16, backend())[0] == "fast"
    assert choose(packed, torch.bfloat16, backend(priority=49))[0] == "int4pack"
    assert choose(packed, torch.float32, backend(priority=49))[0] == "fast"
    assert choose(packed, torch.float32, backend("b"), backend("a"))[0] == "a", "ties go to the alphabet"


@pytest.mark.parametrize(
    "unfit",
    [
        backend(devices=("cuda",)),
        backend(formats=("marlin",)),
        backend(attribute="Picky"),
    ],
)
def test_one_that_cannot_run_it_is_passed_over(packed, unfit):
    assert choose(packed, torch.bfloat16, unfit)[0] == "int4pack"


def test_a_young_enough_gpu(packed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    cuda = {"devices": ("cuda",)}
    assert choose(packed, torch.bfloat16, backend(**cuda, min_capability=90), device="cuda")[0] == "reference"
    assert choose(packed, torch.bfloat16, backend(**cuda, min_capability=80), device="cuda")[0] == "fast"
    assert choose(packed, torch.bfloat16, backend(devices=("cpu",), min_capability=90))[0] == "fast"


def test_a_kernel_is_made_once(packed):
    first, second = choose(packed, torch.float32, backend()), choose(packed, torch.float32, backend())
    assert first[1] is second[1] and Doubling.made == 1


def test_one_that_breaks_is_said_once_and_replaced(packed, capsys):
    broken = backend(attribute="explode")
    assert choose(packed, torch.bfloat16, broken)[0] == "int4pack"
    assert choose(packed, torch.bfloat16, broken)[0] == "int4pack"
    (line,) = capsys.readouterr().err.splitlines()
    assert "'fast'" in line and "awq_test_kernels:explode" in line and "ImportError: no compiler here" in line


def test_a_factory_that_is_not_there_is_replaced_too(packed, capsys):
    assert choose(packed, torch.float32, backend(attribute="Absent"))[0] == "reference"
    assert "awq_test_kernels:Absent" in capsys.readouterr().err


def test_one_is_forced(packed, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    assert choose(packed, torch.bfloat16, backend())[0] == "reference"
    monkeypatch.setenv("AWQ_KERNEL", "fast")
    assert choose(packed, torch.bfloat16, backend(priority=-1))[0] == "fast"


@pytest.mark.parametrize(
    ("forced", "words"),
    [
        ("marlin", ("AWQ_KERNEL=marlin", "no such backend", "fast", "int4pack", "reference")),
        ("int4pack", ("int4pack: float32 activations", "unset AWQ_KERNEL")),
        ("fast", ("fast: not on Fridays", "unset AWQ_KERNEL")),
    ],
)
def test_a_forced_one_that_cannot_is_an_error(packed, monkeypatch, forced, words, one_line):
    monkeypatch.setenv("AWQ_KERNEL", forced)
    with pytest.raises(ConfigError) as caught:
        choose(packed, torch.float32, backend(attribute="Picky"))
    one_line(caught.value, *words)
    assert caught.value.exit_code == 2


def test_a_forced_one_that_breaks_is_an_error(packed, monkeypatch, one_line):
    monkeypatch.setenv("AWQ_KERNEL", "fast")
    with pytest.raises(ConfigError) as caught:
        choose(packed, torch.float32, backend(attribute="explode"))
    one_line(caught.value, "fast: ", "ImportError: no compiler here")


def test_nothing_runs_on_an_unknown_device(packed, one_line):
    with pytest.raises(ConfigError) as caught:
        choose(packed, torch.float32, device="tpu")
    assert "AWQ_KERNEL" not in one_line(
        caught.value, "reference: not on tpu", "int4pack: not on tpu", "cpu: not on tpu"
    )


# -- a plugin's backend, from the hook to the answer ------------------------------------------------------------------


class Plugin:
    @hookimpl
    def awq_architectures(self):
        stack = LayerStack(component="language", blocks="model.layers")
        return (Architecture(family="acorn", model_types=("acorn",), stacks=(stack,)),)

    @hookimpl
    def awq_kernel_backends(self):
        return (backend(),)


@pytest.fixture
def manager():
    manager = PluginManager(allow=())
    manager.register(Plugin(), "acorn")
    return manager


def test_a_plugins_backend_is_among_them(manager):
    assert {one.name for one in manager.kernel_backends()} == {"reference", "int4pack", "cpu", "triton", "fast"}


def test_a_plugins_backend_runs_a_linear(packed, manager):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    ours = QuantLinear(packed, None, torch.float32)
    theirs = QuantLinear(packed, None, torch.float32, backends=manager.kernel_backends())
    assert (ours.backend, theirs.backend) == ("reference", "fast")
    assert torch.equal(theirs(x), 2 * ours(x))


def test_a_plugins_backend_runs_a_loaded_model(quantized_llama, manager):
    model = load(quantized_llama, manager=manager)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14 and {linear.backend for linear in linears} == {"fast"}
