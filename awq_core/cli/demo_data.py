"""What the demo works on: the example model, text for calibration, and text the model has never seen.

All of it is on this machine: the model comes with the checkout, the text is Python's standard library. `held_out.json`
in the model's folder lists the modules that were kept out of training; they are kept out of calibration too.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from awq_core.errors import CheckpointError, OutputError

EXAMPLE = Path("examples") / "pycoder"
HELD_OUT = "held_out.json"
MANIFEST = "demo.json"


def model_folder(given: str | None) -> Path:
    """The folder given, or the example of this checkout.

    Raises:
        CheckpointError: it is not there.
    """
    checkout = Path(__file__).parents[2]
    candidates = [Path(given)] if given else [EXAMPLE, checkout / EXAMPLE]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{candidates[0]}: no model folder", hint="run it from a checkout of awq-core, or give --model DIR"
    )


def held_out_modules(folder: Path) -> tuple[str, ...]:
    """Modules kept out of the model's training, as paths below the standard library: "email/_policybase.py".

    Raises:
        CheckpointError: the folder does not say.
    """
    path = folder / HELD_OUT
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: missing or not JSON", hint="the demo needs to know which modules the model has not seen"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: not a list of module paths", hint='such as ["bdb.py", "email/policy.py"]')
    return tuple(names)


def held_out_texts(names: Sequence[str], characters: int) -> list[str]:
    """An equal share of each held-out module that this Python has, from its middle: code rather than licences.

    Args:
        names: as `held_out_modules` gives them.
        characters: wanted in all.

    Raises:
        CheckpointError: this Python has none of them.
    """
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    paths = [path for path in (root / name for name in names) if path.is_file() and path.resolve().is_relative_to(root)]
    if not paths:
        raise CheckpointError(f"this Python has none of the modules in {HELD_OUT}", hint="use another Python")
    share = -(-characters // len(paths))
    texts = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        start = max(0, (len(text) - share) // 2)
        texts.append(text[text.rfind("\n", 0, start) + 1 :][:share])
    return texts


def clear_output(out: Path, names: Sequence[str]) -> None:
    """Make `out` ready for folders called `names`: those that an earlier demo wrote there are removed, no others.

    Raises:
        OutputError: a folder of that name was not made by the demo, or `out` cannot be written.
    """
    manifest = out / MANIFEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        made = set(json.loads(manifest.read_text(encoding="utf-8"))["made"]) if manifest.is_file() else set()
        foreign = [name for name in names if (out / name).exists() and name not in made]
        if foreign:
            raise OutputError(f"{out / foreign[0]} is there and was not made by the demo", hint="--out another folder")
        manifest.write_text(json.dumps({"made": sorted(made | set(names))}, indent=1) + "\n", encoding="utf-8")
        for name in names:
            shutil.rmtree(out / name, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}", hint="--out another folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{manifest} is not the demo's list", hint="remove it, or --out another folder") from error
