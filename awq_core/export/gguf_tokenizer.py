"""The tokenizer inside a GGUF file: tokens, their kinds, merges or scores, and how text is split before.

llama.cpp has its own tokenizers. "gpt2" merges bytes in pieces that a pattern cuts out, and the pattern is named, not
given: `tokenizer.ggml.pre` picks one of those built in. "llama" is sentencepiece's BPE, with a score for each token in
place of the list of merges. A tokenizer of another kind, or with a pattern that has no name there, is refused, since
llama.cpp would take another one without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from awq_core.errors import CheckpointError

SPACE = "\u2581"
_CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MIXED = rf"{_START}{_UPPER}*{_LOWER}+%s|{_START}{_UPPER}+{_LOWER}*%s|"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
_MARKS = "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
# How text is split, step by step -> llama.cpp's name of it: whole words win over merges, or merges alone count.
PRE: dict[tuple[str, ...], tuple[str, str]] = {
    ("bytes",): ("gpt-2", "gpt-2"),
    ("digits", "bytes"): ("starcoder", "starcoder"),
    (_CASES + _WORDS + r"\p{N}{1,3}" + _REST,): ("llama-bpe", "smaug-bpe"),
    (_CASES + _WORDS + r"\p{N}" + _REST,): ("qwen2", "qwen2"),
    (_MIXED % ("", "") + r"\p{N}" + _TAIL,): ("tekken", "tekken"),
    (_MIXED % (_CASES + "?", _CASES + "?") + r"\p{N}{1,3}" + _TAIL,): ("gpt-4o", "gpt-4o"),
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _PUNCTUATION + _MARKS): ("deepseek-v3", "deepseek-v3"),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIALS = {"bos": "add_bos_token_id", "eos": "add_eos_token_id", "unk": "add_unk_token_id", "pad": "add_pad_token_id"}


def add_tokenizer(writer: Any, folder: Path, size: int, *, trust_remote_code: bool = False) -> None:
    """Write the tokenizer of a model folder to a `gguf.GGUFWriter`.

    Args:
        size: rows of the embedding; tokens that are missing are filled up, and those beyond are left out.

    Raises:
        CheckpointError: there is none, or llama.cpp has none of its kind.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        data = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read, and a gguf file needs one", hint="add its tokenizer.json"
        ) from error
    model = data["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"--to gguf does not know tokenizers of the kind {model['type']}", hint="--to onnx")
    tokens, kinds = listed(data, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores(tokens, model["merges"]))
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(leading_space(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre(data))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    _add_specials(writer, tokenizer, folder)


def listed(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by number, and of which kind it is.

    Args:
        data: tokenizer.json.
    """
    model = data["model"]
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in model["vocab"].items():
        if number < size:
            byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
            tokens[number], kinds[number] = token, BYTE if byte else NORMAL
    for added in data["added_tokens"]:
        if added["id"] < size:
            special = UNKNOWN if added["content"] == model.get("unk_token") else CONTROL
            tokens[added["id"]], kinds[added["id"]] = added["content"], special if added["special"] else USER_DEFINED
    return tokens, kinds


def scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """The score of each token: the earlier the merge that makes it, the higher. Others are never compared."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(_pair(merge)), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def leading_space(data: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    steps = _steps(data.get("normalizer")) + _steps(data.get("pre_tokenizer"))
    return any(
        (step["type"] == "Prepend" and step["prepend"] == SPACE)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def pre(data: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text. Raises CheckpointError where it has none."""
    changes = [step["type"] for step in _steps(data.get("normalizer")) if step["type"] != "NFC"]
    steps = _steps(data.get("pre_tokenizer"))
    found: list[str] = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += ["bytes"] if step["use_regex"] else []
        else:
            changes.append(step["type"])
    if changes or tuple(found) not in PRE or not any(step["type"] == "ByteLevel" for step in steps):
        raise CheckpointError(
            "the tokenizer splits text in a way that llama.cpp has no name for, as far as known here",
            hint="--to scaled-fp16, then llama.cpp's convert_hf_to_gguf.py",
        )
    whole, merged = PRE[tuple(found)]
    return whole if data["model"].get("ignore_merges") else merged


def _add_specials(writer: Any, tokenizer: Any, folder: Path) -> None:
    """Which tokens begin and end a text, whether they are put there, and the chat template."""
    for kind, method in SPECIALS.items():
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, method)(number)
    framed = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and framed[0] == bos)
    writer.add_add_eos_token(eos is not None and framed[-1] == eos)
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        others = [number for number in ends if number != eos] if isinstance(ends, list) else []
        if others:
            writer.add_eot_token_id(others[0])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pair(merge: Any) -> list[str]:
    """A merge as its two sides; older files have them in one string."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [one for part in step.get("normalizers", step.get("pretokenizers", [])) for one in _steps(part)]
