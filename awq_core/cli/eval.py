"""`awq eval`: perplexity on text or captions of images, bits per byte, tasks; with the original, what changed."""

from __future__ import annotations

from typing import Any

import click

from awq_core.cli.eval_options import Request, eval_options
from awq_core.cli.options import (
    device_option,
    json_option,
    plugin_option,
    split_option,
    text_option,
    trust_option,
)
from awq_core.cli.output import note, print_json


@click.command(
    "eval",
    epilog="""\b
Examples:
  awq eval DIR
  awq eval DIR --text notes.txt --against MODEL
  awq eval DIR --text wikitext2 --against MODEL --cache logits --gate 'kl<0.02'
  awq eval DIR --text c4
  awq eval DIR --text notes.txt --stride 512
  awq eval DIR --text pile.jsonl.zst --bits-per-byte --include ArXiv,Github
  awq eval DIR --images photos/ --against MODEL --gate 'kl<0.02'
  awq eval DIR --tasks hellaswag,arc_easy --few-shot 0
  awq eval DIR --tasks metrics.py:accuracy --gate 'accuracy.right>=0.7'
\b
wikitext2 and c4 are fetched from the hub, by the protocols of the GPTQ and AWQ
papers. Without --text: source of the Python standard library, 16 windows unless
--max-windows is given; good for comparing a model with its original.
""",
)
@click.argument("model", metavar="DIR")
@text_option
@split_option
@eval_options
@device_option
@plugin_option
@trust_option
@json_option
def evaluate(
    model: str, device: str, plugin: str | None, trust_remote_code: bool, as_json: bool, **options: Any
) -> None:
    """Measure the model in DIR, quantized or not; with --against, its distance from the original."""
    request = Request(**options)
    request.check()
    from awq_core.calibration import describe_source
    from awq_core.cli import models
    from awq_core.cli.eval_run import (
        Session,
        check_gates,
        gates_of,
        measure_bytes,
        measure_images,
        measure_tasks,
        measure_text,
    )
    from awq_core.cli.eval_show import tell
    from awq_core.cli.eval_text import eval_text

    gates = gates_of(request)
    models.check_folders(model, request.against)
    given = None
    if request.wants_text:
        given = eval_text(
            request.source, request.split, request.window, request.max_windows, c4=request.method in ("c4", "c4-new")
        )
        note(f"text: {given.name}")
    text = given.name if given else describe_source(request.source) if request.bits_per_byte else None
    tokenizer = models.open_tokenizer(model, trust_remote_code=trust_remote_code)
    session = Session(model, tokenizer, request, device, plugin, trust_remote_code, as_json)
    result: dict[str, Any] = {"model": model, "text": text}
    result |= {"perplexity": None, "against": None}
    measured: dict[str, float] = {}
    for part in (
        measure_text(session, given) if given else None,
        measure_bytes(session) if request.bits_per_byte else None,
        measure_images(session) if request.images else None,
        measure_tasks(session) if request.tasks else None,
    ):
        if part is not None:
            result |= part.values
            measured |= part.metrics
    results = check_gates(gates, measured)
    if results:
        result["gates"] = [one.to_dict() for one in results]
    if as_json:
        print_json(result)
    else:
        tell(result)
    from awq_core.evaluation.gates import require

    require(results)
