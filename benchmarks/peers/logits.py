"""Logits of transformers' own model of an AWQ folder, its linears GPTQModel's. On two cores that needs the variable."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
import transformers
from safetensors.torch import save_file


def loaded(folder: str, backend: str) -> Any:
    """The model in float32; `backend` is that of `AwqConfig`, "auto" what the folder gets when nothing is asked for.

    Raises:
        ValueError: a tensor is missing, misshapen or has no place: transformers would only warn.
    """
    asked = {} if backend == "auto" else {"quantization_config": transformers.AwqConfig(backend=backend)}
    model, outcome = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **asked
    )
    faults = {kind: sorted(map(str, names)) for kind, names in outcome.items() if names}
    if faults:
        raise ValueError(f"from_pretrained: {faults}")
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Reads {"model", "ids": [[token, ..]], "backends", "out", "threads"}.

    Writes the file "out" with the logits [sequences, tokens, vocabulary] of each backend. Prints as JSON

        {"versions": {package: version}, "linears": {backend: {class of the quantized linears: how many}}}
    """
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(wanted["threads"])
    transformers.utils.logging.disable_progress_bar()
    found, linears = {}, {}
    for backend in wanted["backends"]:
        model = loaded(wanted["model"], backend)
        found[backend] = model(input_ids=torch.tensor(wanted["ids"]), use_cache=False).logits.float().contiguous()
        names = [type(module).__name__ for module in model.modules() if hasattr(module, "qweight")]
        linears[backend] = {name: names.count(name) for name in sorted(set(names))}
    save_file(found, wanted["out"])
    versions = {package: version(package) for package in ("transformers", "gptqmodel", "torch")}
    print(json.dumps({"versions": versions, "linears": linears}))


if __name__ == "__main__":
    main()
