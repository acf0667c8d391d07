"""A user's own metric: a function in a Python file that the user names, `metrics.py:accuracy`.

    def accuracy(model, tokenizer):
        return {"right": 0.71}

The file is run as it is, with everything Python may do; it is code the user chose, like a script that is started.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
from pathlib import Path
from typing import Any

from awq_core.errors import AwqError, ConfigError
from awq_core.evaluation.perplexity import evaluating


def is_custom(task: str) -> bool:
    """Whether a task is written FILE.py:function, or means to be and names no function."""
    return ".py:" in task or task.endswith(".py")


def custom_metric(task: str, model: Any, tokenizer: Any) -> dict[str, float]:
    """Numbers by name that the function returns.

    Raises:
        ConfigError: no such file or function.
        AwqError: the file or the function fails, or returns something else than a dict of numbers.
    """
    function = find(task)
    try:
        with evaluating(model):
            found = function(model, tokenizer)
    except AwqError:
        raise
    except Exception as error:
        raise AwqError(f"{task} failed: {_words(error)}", hint="AWQ_DEBUG=1 shows the traceback") from error
    if not isinstance(found, dict) or not found:
        raise AwqError(f"{task} returned {type(found).__name__}, not a dict of numbers", hint='return {"name": 0.5}')
    for name, value in found.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not isinstance(name, str) or not number or not math.isfinite(value):
            raise AwqError(f"{task} returned {name!r}: {value!r}, not a finite number", hint='return {"name": 0.5}')
    return {name: float(value) for name, value in found.items()}


def find(task: str) -> Any:
    """The function that `FILE.py:function` names.

    Raises: as `custom_metric`.
    """
    file, _, name = task.rpartition(":")
    if not file or name.endswith(".py"):
        raise ConfigError(f"{task} names no function", hint="write it as FILE.py:function")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{task}: no such file: {file}", hint="write it as FILE.py:function")
    spec = importlib.util.spec_from_file_location(f"awq_metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a name that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise AwqError(f"{file} cannot be run: {_words(error)}", hint="AWQ_DEBUG=1 shows the traceback") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{file} has no function {name!r}", hint="def function(model, tokenizer): return {...}")
    return function


def name_of(task: str) -> str:
    """What its metrics are called by: "accuracy" of "metrics.py:accuracy"."""
    return task.rpartition(":")[2]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
