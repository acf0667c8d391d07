"""The small files that make a folder of weights a model: tokenizer, chat template, processor, generation settings."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".tflite"}
COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
LEFT = {"config.json", "quant_config.json", "quantize_config.json"}
LARGEST = 256 << 20


def side_files(folder: Path, *, include_code: bool = False) -> dict[str, Path | str]:
    """Files to carry over, by name.

    Args:
        include_code: copy the model's own `*.py` too, for models that need remote code.
    """
    files: dict[str, Path | str] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        wanted = suffix in COPIED or (include_code and suffix == ".py")
        if not path.is_file() or suffix in WEIGHTS or path.name in LEFT or path.name.endswith(".index.json"):
            continue
        if wanted and path.stat().st_size <= LARGEST:
            files[path.name] = path
    return files
