"""Benchmarks (MMLU, HellaSwag, ARC, WinoGrande, GSM8K, ...) through lm-evaluation-harness, the extra `eval`.

The tasks, their prompts, few-shot examples and metrics are lm-eval's, so numbers are comparable with everybody's; the
model is the one in memory (`awq_core.integrations.lm_eval`). A metric is called by its task, its name and, where it is
not "none", its filter: "hellaswag.acc_norm", "gsm8k.exact_match.strict-match".
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_core.errors import AwqError, ConfigError
from awq_core.evaluation.perplexity import evaluating

# What lm-eval's result has beside the metrics of a task.
ABOUT = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """One number of one task.

    Attributes:
        value: of the metric.
        stderr: its standard error; None where lm-eval has none.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Metrics by name, "task.metric", and how they were measured."""

    metrics: Mapping[str, TaskMetric]
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = {name: {"value": one.value, "stderr": one.stderr} for name, one in self.metrics.items()}
        return {"metrics": rows, "protocol": self.protocol}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    allow_code: bool = False,
    seed: int = 0,
) -> TaskResult:
    """Run tasks of lm-evaluation-harness on a model.

    Args:
        model: a transformers model, such as `awq_core.load` gives.
        tokenizer: its own.
        tasks: names of tasks or groups.
        folder: of task files (YAML) of the user's own, beside those of lm-eval. Such a file may name Python functions
            of its folder, which are run.
        few_shot: examples before the question; by default the task's own number.
        limit: questions of each task; for a quick look only.
        batch_size: requests at a time.
        max_length: tokens of context; by default the model's.
        allow_code: run the code that a model writes, as HumanEval needs.
        seed: of the few-shot examples.

    Raises:
        ConfigError: lm-eval is not installed, or knows no such task.
        AwqError: a task fails, for one because its data cannot be had offline.
    """
    try:
        evaluator = importlib.import_module("lm_eval.evaluator")
        manager_class = importlib.import_module("lm_eval.tasks").TaskManager
        harness = importlib.import_module("awq_core.integrations.lm_eval").AwqLM
    except ImportError as error:
        raise ConfigError(f"tasks need lm-eval: {error}", hint="pip install awq-core[eval]") from error
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"{folder}: no such folder of tasks", hint="a folder with task files (.yaml)")
    manager = _manager(manager_class, tasks, folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown)}", hint="`lm-eval ls tasks` lists them")
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the metric that runs code
    # lm-eval gives a tokenizer without one a padding token.
    own = copy.deepcopy(tokenizer)
    wrapped = harness(model, tokenizer=own, batch_size=batch_size, max_length=max_length)
    try:
        with evaluating(model):
            found = evaluator.simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=allow_code,
            )
    except Exception as error:  # data that cannot be had, a task file with a mistake: each has a family of its own
        raise AwqError(f"{', '.join(tasks)}: {_problem(error)}", hint=_hint()) from error
    version = importlib.import_module("importlib.metadata").version("lm_eval")
    shots = "the tasks' own number of examples" if few_shot is None else f"{few_shot} examples"
    part_of = "" if limit is None else f", the first {limit} questions of each"
    return TaskResult(metrics_of(found["results"]), f"lm-eval {version}, {shots}{part_of}")


def _manager(kind: Any, tasks: Sequence[str], folder: str | os.PathLike[str] | None) -> Any:
    """lm-eval's index of tasks: of the folder alone where that has all, as the thousands of its own take seconds."""
    if folder is not None:
        manager = kind(include_path=os.fspath(folder), include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    return kind(include_path=None if folder is None else os.fspath(folder))


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskMetric]:
    """{"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}} as {"arc.acc": TaskMetric(0.5, 0.1)}."""
    found: dict[str, TaskMetric] = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if key in ABOUT or name.endswith("_stderr") or isinstance(value, (str, bool)):
                continue
            with suppress(TypeError, ValueError):
                error = values.get(f"{name}_stderr,{chosen}")
                spread = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
                metric = name if chosen in ("", "none") else f"{name}.{chosen}"
                found[f"{task}.{metric}"] = TaskMetric(float(value), spread)
    return found


def quiet() -> None:
    """lm-eval logs every step to stderr; its warnings stay."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _problem(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{type(error).__name__}: {line}"


def _hint() -> str:
    offline = any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return "its data must be on disk: HF_HUB_OFFLINE is set" if offline else "AWQ_DEBUG=1 shows the traceback"
