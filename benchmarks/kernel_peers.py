"""Other projects' int4 products, one small function each, for benchmarks/kernels.py.

Each runs in an environment of its own (kernel_worker.py), in which it may not be installed: then it raises ImportError.
A function takes a `Problem` and says how its product is bound to an input. W4A8 means that activations are rounded to
int8 too, which costs about 0.75 % of error; "exact" that the AWQ codes, zero points and scales are used as they are.
Nothing of this project is imported here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# An input fp32 [rows, in] -> (run the product, read its result as [rows, out]).
Bind = Callable[[np.ndarray], tuple[Callable[[], Any], Callable[[Any], np.ndarray]]]


@dataclass(frozen=True)
class Problem:
    """W = (codes - zeros) * scales, group by group.

    Attributes:
        codes: uint8 [out, in], 0..15.
        zeros: uint8 [out, groups], 0..15.
        scales: fp32 [out, groups], each one a value of fp16.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.zeros.shape[1]

    @property
    def weight(self) -> np.ndarray:
        """fp32 [out, in]."""
        weight = self.codes.reshape(*self.zeros.shape, self.group).astype(np.float32)
        return ((weight - self.zeros[..., None]) * self.scales[..., None]).reshape(self.codes.shape)


def halves(values: np.ndarray) -> np.ndarray:
    """Two values of the last axis to a byte, the first in the low half; a last one without a partner gets a zero."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
    return np.ascontiguousarray(values[..., ::2] | values[..., 1::2] << 4)


# -- CPU


def onnxruntime(problem: Problem, threads: int, *, level: int) -> Bind:
    """`MatMulNBits`, exact; `level` 4 rounds activations to int8, 1 computes in fp32."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = problem.codes.shape
    constants = {
        "B": halves(problem.codes.reshape(*problem.zeros.shape, problem.group)),
        "scales": problem.scales.reshape(-1),
        "zeros": halves(problem.zeros).reshape(-1),
    }
    settings = {"K": inputs, "N": outputs, "bits": 4, "block_size": problem.group, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **settings)
    given, made = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", k]) for n, k in (("x", inputs), ("y", outputs))
    )
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [given], [made], tensors), opset_imports=versions)
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: (partial(session.run, None, {"x": x}), lambda result: result[0])


def openvino(problem: Problem, threads: int, *, precision: str, dynamic: int) -> Bind:
    """A u4 weight that the CPU plugin keeps compressed, exact; `dynamic` inputs share an int8 scale, 0: no int8."""
    import openvino as ov
    from openvino import opset13 as ops

    outputs, inputs = problem.codes.shape
    groups = problem.zeros.shape[1]
    kept: list[np.ndarray] = []

    def nibbles(values: np.ndarray, shape: list[int]) -> Any:
        packed = halves(values.reshape(1, -1)).reshape(-1)
        kept.append(packed)  # the tensor below does not hold it
        return ops.convert(ops.constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.u4)), ov.Type.f16)

    codes = nibbles(problem.codes, [outputs, groups, problem.group])
    zeros = nibbles(problem.zeros, [outputs, groups, 1])
    scales = ops.constant(problem.scales.astype(np.float16)[..., None])
    weight = ops.reshape(ops.multiply(ops.subtract(codes, zeros), scales), [outputs, inputs], False)
    x = ops.parameter([-1, inputs], ov.Type.f32)
    model = ov.Model([ops.matmul(x, ops.convert(weight, ov.Type.f32), False, True)], [x])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic,
        "ENABLE_CPU_PINNING": False,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def bind(x: np.ndarray, kept: list[np.ndarray] = kept) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
        run = partial(request.infer, {0: x}, share_inputs=True, share_outputs=True)
        return run, lambda result: np.array(result[0])

    return bind


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def llama_cpp(problem: Problem, threads: int, *, kind: int) -> Bind:
    """ggml's product in its repacked layout, through C. `kind` is ggml's number of the type: 2 Q4_0, 12 Q4_K.

    Not exact: Q4_K rounds scales to 6 bits, Q4_0 has no zero points; both round activations to int8.
    """
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    ggml, cpu = (ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu"))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64

    def call(library: ctypes.CDLL, name: str, result: Any, *types: Any) -> Any:
        function = getattr(library, name)
        function.restype, function.argtypes = result, types
        return function

    init = call(ggml, "ggml_init", pointer, _InitParams)
    new = call(ggml, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, number, number)
    product = call(ggml, "ggml_mul_mat", pointer, pointer, pointer, pointer)
    put = call(ggml, "ggml_backend_tensor_set", None, pointer, pointer, size, size)
    get = call(ggml, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
    graph_of = call(ggml, "ggml_new_graph", pointer, pointer)
    expand = call(ggml, "ggml_build_forward_expand", None, pointer, pointer)
    compute = call(ggml, "ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
    on_backend = call(ggml, "ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer)
    on_type = call(ggml, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
    row_bytes = call(ggml, "ggml_row_size", size, ctypes.c_int, number)
    rounded = call(ggml, "ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, number, number, number, pointer)
    room = call(ggml, "ggml_tensor_overhead", size)() * 8 + call(ggml, "ggml_graph_overhead", size)()
    backend = call(cpu, "ggml_backend_cpu_init", pointer)()
    call(cpu, "ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)(backend, threads)
    registry = call(cpu, "ggml_backend_cpu_reg", pointer)()
    address = call(ggml, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
    device = call(ggml, "ggml_backend_reg_dev_get", pointer, pointer, size)(registry, 0)
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address(registry, b"ggml_backend_dev_get_extra_bufts"))
    name_of = call(ggml, "ggml_backend_buft_name", ctypes.c_char_p, pointer)
    kinds = []
    for one in extra(device):
        if not one:
            break
        kinds.append(one)
    repacked = next((one for one in kinds if name_of(one) == b"CPU_REPACK"), None)
    if repacked is None:
        raise RuntimeError("this build of ggml has no repacked layout")

    outputs, inputs = problem.codes.shape
    weight = problem.weight
    packed = np.empty(row_bytes(kind, inputs) * outputs, np.uint8)
    rounded(kind, weight.ctypes.data, packed.ctypes.data, 0, outputs, inputs, None)
    holder = init(_InitParams(room, None, True))
    w = new(holder, kind, inputs, outputs)
    on_type(holder, repacked)
    put(w, packed.ctypes.data, 0, packed.nbytes)

    def bind(x: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
        context = init(_InitParams(room, None, True))
        given = new(context, 0, inputs, len(x))
        made = product(context, w, given)
        graph = graph_of(context)
        expand(graph, made)
        on_backend(context, backend)
        put(given, x.ctypes.data, 0, x.nbytes)

        def read(_: Any) -> np.ndarray:
            result = np.empty((len(x), outputs), np.float32)
            get(made, result.ctypes.data, 0, result.nbytes)
            return result

        return partial(compute, backend, graph), read

    return bind


# -- CUDA


def on_cuda(layer: Callable[[Any], Any]) -> Bind:
    """A torch module's product, in bf16."""
    import torch

    def bind(x: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
        given = torch.from_numpy(x).to("cuda", torch.bfloat16)
        return partial(torch.no_grad()(layer), given), lambda result: result.float().cpu().numpy()

    return bind


def plain_linear(problem: Problem) -> Any:
    """The weight as a torch linear in bf16, for those that quantize by themselves: their codes are not AWQ's."""
    import torch

    linear = torch.nn.Linear(*reversed(problem.codes.shape), bias=False, dtype=torch.bfloat16, device="cuda")
    linear.weight.data.copy_(torch.from_numpy(problem.weight))
    return linear


def gemlite(problem: Problem, threads: int) -> Bind:
    """Triton, exact."""
    import torch
    from gemlite.core import DType, GemLiteLinear

    outputs, inputs = problem.codes.shape
    layer = GemLiteLinear(
        4, problem.group, inputs, outputs, input_dtype=DType.BF16, output_dtype=DType.BF16, scaled_activations=False
    )
    codes, zeros = (torch.from_numpy(one).cuda() for one in (problem.codes, problem.zeros))
    scales = torch.from_numpy(problem.scales).to("cuda", torch.bfloat16)
    layer.pack(codes, scales, zeros.to(torch.bfloat16), None)
    return on_cuda(layer)


def marlin(problem: Problem, threads: int) -> Bind:
    """GPTQModel's build of Marlin on AWQ codes, exact."""
    import torch
    from gptqmodel.nn_modules.qlinear.marlin_awq import AwqMarlinLinear

    outputs, inputs = problem.codes.shape
    shape = {"group_size": problem.group, "in_features": inputs, "out_features": outputs}
    settings = {"bits": 4, "desc_act": False, "sym": False, "register_buffers": True, "dtype": torch.bfloat16}
    layer = AwqMarlinLinear(**shape, **settings).cuda()
    scales = torch.from_numpy(problem.scales.T.copy()).to("cuda", torch.bfloat16)
    words = (torch.from_numpy(awq_words(one)).cuda() for one in (problem.codes.T, problem.zeros.T))
    for name, value in zip(("qweight", "qzeros", "scales"), (*words, scales), strict=True):
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    layer.post_init()
    return on_cuda(layer)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """[rows, out] -> int32 [rows, out/8] in AWQ's order of nibbles."""
    eights = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint32)
    return np.bitwise_or.reduce(eights << (4 * np.arange(8, dtype=np.uint32)), -1).view(np.int32)


def torchao(problem: Problem, threads: int) -> Bind:
    """torch's tinygemm through torchao, on codes of its own."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = plain_linear(problem)
    quantize_(linear, Int4WeightOnlyConfig(group_size=problem.group, int4_packing_format="tile_packed_to_4d"))
    return on_cuda(linear)


def bitsandbytes(problem: Problem, threads: int) -> Bind:
    """NF4 in blocks of 64, its own codes."""
    import torch
    from bitsandbytes.nn import Linear4bit

    outputs, inputs = problem.codes.shape
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({"weight": torch.from_numpy(problem.weight).to(torch.bfloat16)})
    return on_cuda(layer.cuda())


@dataclass(frozen=True)
class Peer:
    """Attributes: its environment (a name in peers/environments.py), device, function, exact: AWQ's own codes."""

    environment: str
    device: str
    function: Callable[[Problem, int], Bind]
    exact: bool


PEERS: dict[str, Peer] = {
    "onnxruntime-w4a8": Peer("onnxruntime", "cpu", partial(onnxruntime, level=4), True),
    "onnxruntime": Peer("onnxruntime", "cpu", partial(onnxruntime, level=1), True),
    "openvino-w4a8": Peer("openvino", "cpu", partial(openvino, precision="f32", dynamic=128), True),
    "openvino": Peer("openvino", "cpu", partial(openvino, precision="bf16", dynamic=0), True),
    "llama.cpp-q4_k": Peer("llama-cpp", "cpu", partial(llama_cpp, kind=12), False),
    "llama.cpp-q4_0": Peer("llama-cpp", "cpu", partial(llama_cpp, kind=2), False),
    "gemlite": Peer("gemlite", "cuda", gemlite, True),
    "marlin": Peer("gptqmodel", "cuda", marlin, True),
    "torchao": Peer("torchao", "cuda", torchao, False),
    "bitsandbytes": Peer("bitsandbytes", "cuda", bitsandbytes, False),
}
