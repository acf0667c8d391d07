"""The core's own answers, given through the same hooks as a plugin's, after the owner's.

They read the `Architecture` a plugin declared, so a plugin that says everything as data implements one hook. A plugin
that wants a default with a change calls it from here and returns the changed result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from awq_core.errors import CalibrationError
from awq_core.hooks import hookimpl
from awq_core.hooks.types import Architecture, ComponentPolicy, FusedBlock, KernelBackend, LayerStack, ScaleGroup

LANGUAGE = "language"


# Named as strings: nothing of a kernel is imported before it is chosen.
KERNEL_BACKENDS = (
    KernelBackend(
        name="reference",
        formats=("gemm",),
        devices=("cpu", "cuda", "xpu", "mps"),
        factory="awq_core.kernels.reference:ReferenceKernel",
    ),
    KernelBackend(
        name="int4pack",
        formats=("gemm",),
        devices=("cpu",),
        factory="awq_core.kernels.cpu.int4pack:Int4PackKernel",
        priority=50,
    ),
    KernelBackend(
        name="cpu",
        formats=("gemm",),
        devices=("cpu",),
        factory="awq_core.kernels.cpu.w4a16:W4A16Kernel",
        priority=60,
    ),
    KernelBackend(
        name="triton",
        formats=("gemm",),
        devices=("cuda",),
        min_capability=80,
        factory="awq_core.kernels.triton.backend:TritonKernel",
        priority=-1,  # has never run on a GPU: AWQ_KERNEL=triton alone chooses it
    ),
)


@hookimpl
def awq_kernel_backends() -> Sequence[KernelBackend]:
    """The kernels that come with the core."""
    return KERNEL_BACKENDS


@hookimpl
def awq_layer_stacks(arch: Architecture) -> Sequence[LayerStack]:
    """The stacks the architecture declares."""
    return arch.stacks


@hookimpl
def awq_scale_groups(arch: Architecture, stack: LayerStack) -> Sequence[ScaleGroup]:
    """The declared groups for every block of the language stack, none for other components."""
    return arch.scale_groups if stack.component == LANGUAGE else ()


@hookimpl
def awq_component_policies(arch: Architecture) -> Sequence[ComponentPolicy]:
    """The declared policies, else: quantize "language", keep every other component."""
    if arch.components:
        return arch.components
    others = dict.fromkeys(stack.component for stack in arch.stacks if stack.component != LANGUAGE)
    language = ComponentPolicy(component=LANGUAGE, action="quantize", reason="default: holds most of the weights")
    kept = (
        ComponentPolicy(
            component=name, action="keep", reason=f"default: only {LANGUAGE} is quantized; --component {name}=4bit"
        )
        for name in others
    )
    return (language, *kept)


@hookimpl
def awq_fused_blocks(arch: Architecture) -> Sequence[FusedBlock]:
    """The declared run-time replacements."""
    return arch.fused


@hookimpl
def awq_calibration_batch(processor: Any, sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tokens of the text or the conversation; with images, what the processor makes of text and images together."""
    images, messages = list(sample.get("images") or ()), sample.get("messages")
    tokenizer = getattr(processor, "tokenizer", None) or processor
    chat = next((one for one in (processor, tokenizer) if _has_chat_template(one)), None)
    if messages and chat is not None and not images:
        return chat.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    if messages and chat is not None:
        text = chat.apply_chat_template(messages, tokenize=False)
    elif messages:
        text = "\n".join(_plain(message) for message in messages)
    elif isinstance(sample.get("text"), str):
        text = sample["text"]
    else:
        raise CalibrationError(
            f"a calibration sample has neither text nor messages, only {', '.join(map(str, sample)) or 'nothing'}",
            hint='each sample needs "text" (a string) or "messages" (a list of role and content)',
        )
    if images:
        return processor(text=_with_placeholders(text, processor, len(images)), images=images, return_tensors="pt")
    return tokenizer(text, return_tensors="pt")


def _has_chat_template(processor: Any) -> bool:
    # transformers gives every tokenizer the method; it raises where the checkpoint brought no template
    return hasattr(processor, "apply_chat_template") and getattr(processor, "chat_template", "") is not None


def _plain(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def _with_placeholders(text: str, processor: Any, images: int) -> str:
    """Processors count one placeholder an image; captions and plain text come without any."""
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        return text
    return token * max(0, images - text.count(token)) + text
