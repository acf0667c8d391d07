"""What `awq eval` runs: each part measures one kind of thing, and says it in plain values and in numbers for gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from awq_core.calibration import Subsets, read_samples
from awq_core.cli import models
from awq_core.cli.eval_options import BYTE_AGAINST, MEASURED_SAMPLES, TEXT_AGAINST, Request
from awq_core.cli.eval_text import DIVERGENCE_WINDOW, EvalText
from awq_core.cli.output import note
from awq_core.cli.progress import measuring
from awq_core.errors import ConfigError
from awq_core.evaluation import (
    bits_per_byte,
    c4_perplexity,
    caption_batches,
    caption_perplexity,
    divergence,
    perplexity,
    run_tasks,
    sliding_perplexity,
)
from awq_core.evaluation.custom import custom_metric, is_custom, name_of
from awq_core.evaluation.gates import Gate, GateResult, check, check_names
from awq_core.evaluation.perplexity import STANDARD_WINDOW, fitting_window, token_ids
from awq_core.evaluation.reference import ReferenceLogits
from awq_core.evaluation.tasks import quiet
from awq_core.model_folder import resolve
from awq_core.sizes import parse_size

STRIDE = 512
# Not calibration's usual one: of a large data set other samples come first.
EVALUATION_SEED = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Plain values for the result, and numbers by the names that gates call them."""

    values: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass
class Session:
    """The models of a run, opened when they are first needed."""

    name: str
    tokenizer: Any
    request: Request
    device: str
    plugin: str | None
    trust_remote_code: bool
    as_json: bool
    opened: dict[str, Any] = field(default_factory=dict)

    def open(self, name: str) -> Any:
        """A model, once."""
        if name not in self.opened:
            options: dict[str, Any] = {"plugin": self.plugin, "trust_remote_code": self.trust_remote_code}
            self.opened[name] = models.open_model(name, device=self.device, **options)
        return self.opened[name]

    @property
    def model(self) -> Any:
        """The one that is measured."""
        return self.open(self.name)

    @cached_property
    def reference(self) -> ReferenceLogits | None:
        """The cache of --against, where --cache is given."""
        request = self.request
        if request.cache is None or request.against is None:
            return None
        name, device = request.against, models.pick_device(self.device)
        limit = parse_size(request.cache_limit)
        return ReferenceLogits(name, request.cache, lambda: self.open(name), device=device, limit=limit)


def gates_of(request: Request) -> list[Gate]:
    """The gates that were asked for.

    Raises:
        ConfigError: no gate, or one on what is not measured.
    """
    gates = [Gate.parse(text) for text in request.gates]
    for gate in gates:
        if request.against is None and gate.metric in (*TEXT_AGAINST, *BYTE_AGAINST):
            raise ConfigError(f"gate {gate.text!r} compares with the original", hint="--against ORIGINAL")
    check_names(gates, request.metrics, [name_of(name) for name in request.task_names])
    return gates


def check_gates(gates: list[Gate], measured: Mapping[str, float]) -> list[GateResult]:
    """Each gate beside what was measured. Raises ConfigError where a task has no such metric."""
    return check(gates, measured)


def measure_text(session: Session, given: EvalText) -> Part:
    """Perplexity and, with --against, the original's and the divergence from it."""
    request, tokenizer = session.request, session.tokenizer
    mine = _perplexity(session, session.model, given, session.name)
    values: dict[str, Any] = {"perplexity": mine}
    metrics: dict[str, float] = {"ppl": mine["perplexity"]}
    if request.against is None:
        return Part(values, metrics)
    name, kept = request.against, session.reference
    if kept is None:
        reference = session.open(name)
        theirs = _perplexity(session, reference, given, name)
    else:
        reference = kept
        settings = (request.method, request.window, request.stride, given.windows)
        texts = "\0".join(str(one) for one in given.documents).encode("utf-8", "surrogatepass")
        ids = token_ids(tokenizer, given.text).numpy().tobytes()
        key = kept.key("perplexity", repr(settings), ids, texts)
        theirs = kept.remember(key, lambda: _perplexity(session, kept.model, given, name))
    length = request.window or min(DIVERGENCE_WINDOW, mine["window"])
    limit = None if given.windows is None else given.windows * max(1, mine["window"] // length)
    with measuring("divergence", session.as_json) as progress:
        apart = divergence(
            reference, session.model, tokenizer, given.text, window=length, max_windows=limit, progress=progress
        )
    if kept is not None and not kept.opened:
        note(f"{name}: its logits were in {request.cache}, it was not opened")
    values["against"] = {
        "model": name,
        "perplexity": theirs,
        "difference": mine["perplexity"] - theirs["perplexity"],
        "divergence": apart.to_dict(),
    }
    metrics["ppl_increase"] = _increase(mine["perplexity"], theirs["perplexity"])
    metrics |= {"kl": apart.kl_mean, "kl_median": apart.kl_median, "kl_p999": apart.kl_p999}
    metrics |= {"top1": apart.top1_agreement, "top5": apart.top5_agreement}
    return Part(values, metrics)


def measure_bytes(session: Session) -> Part:
    """Bits per byte and, with --against, the original's."""
    request = session.request
    subsets = Subsets.parse(request.include, request.exclude)

    def measure(name: str) -> dict[str, Any]:
        samples = read_samples(request.source, split=request.split, subsets=subsets)
        with measuring(f"bits per byte of {name}", session.as_json) as progress:
            found = bits_per_byte(
                session.open(name),
                session.tokenizer,
                samples,
                window=request.window,
                max_documents=request.max_documents,
                progress=progress,
            )
        return found.to_dict()

    mine = measure(session.name)
    if request.against is None:
        return Part({"bits_per_byte": {**mine, "against": None}}, {"bpb": mine["bits_per_byte"]})
    theirs = measure(request.against)
    increase = _increase(mine["bits_per_byte"], theirs["bits_per_byte"])
    values = {**mine, "against": {"model": request.against, **theirs}}
    return Part({"bits_per_byte": values}, {"bpb": mine["bits_per_byte"], "bpb_increase": increase})


def measure_images(session: Session) -> Part:
    """Perplexity of captions given images and, with --against, the original's and the divergence from it."""
    request = session.request
    data = caption_batches(
        resolve(session.name),
        request.images,
        samples=request.measure or MEASURED_SAMPLES,
        seed=EVALUATION_SEED,
        plugin=session.plugin,
        trust_remote_code=session.trust_remote_code,
    )
    model, reference = session.model, session.open(request.against) if request.against else None
    with measuring(f"captions of {data.source}", session.as_json) as progress:
        found = caption_perplexity(model, data.batches, reference=reference, progress=progress)
    values, mine, against = found.to_dict(), found.perplexity.mean, found.against
    metrics = {"ppl": mine}
    if against:
        values["against"] = {"model": request.against, **values["against"]}
        metrics["ppl_increase"] = _increase(mine, against.perplexity.mean)
        metrics |= {"kl": against.kl.mean, "top1": against.agreement.mean}
    return Part({"images": {"source": data.source, **values}}, metrics)


def measure_tasks(session: Session) -> Part:
    """Tasks of lm-evaluation-harness and the user's own functions, in the order they were named in."""
    request, rows, words = session.request, dict[str, Any](), list[str]()
    for task in (name for name in request.task_names if is_custom(name)):
        found = custom_metric(task, session.model, session.tokenizer)
        rows |= {f"{name_of(task)}.{name}": {"value": value, "stderr": None} for name, value in found.items()}
        words.append(task)
    if theirs := [name for name in request.task_names if not is_custom(name)]:
        quiet()
        result = run_tasks(
            session.model,
            session.tokenizer,
            theirs,
            folder=request.task_folder,
            few_shot=request.few_shot,
            limit=request.limit,
            batch_size=request.batch_size,
            allow_code=request.allow_code,
        ).to_dict()
        rows |= result["metrics"]
        words.append(result["protocol"])
    metrics = {name: row["value"] for name, row in rows.items()}
    return Part({"tasks": {"metrics": rows, "protocol": "; ".join(words)}}, metrics)


def _perplexity(session: Session, network: Any, given: EvalText, name: str) -> dict[str, Any]:
    request = session.request
    common: dict[str, Any] = {"window": request.window, "max_windows": given.windows}
    with measuring(f"perplexity of {name}", session.as_json) as progress:
        common["progress"] = progress
        if request.method == "sliding":
            window = fitting_window(request.window or STANDARD_WINDOW, network)
            stride = request.stride or min(STRIDE, max(1, window // 2))
            found = sliding_perplexity(network, session.tokenizer, given.text, stride=stride, **common)
        elif given.documents:
            found = c4_perplexity(network, session.tokenizer, given.documents, protocol=request.method, **common)
        else:
            found = perplexity(network, session.tokenizer, given.text, **common)
    return found.to_dict()


def _increase(mine: float, theirs: float) -> float:
    """Relative; NaN where there is none."""
    return mine / theirs - 1 if math.isfinite(theirs) and theirs else math.nan
