"""The options of `awq eval`, what they ask for, and which of them contradict one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from awq_core.cli.options import Decorator
from awq_core.sizes import parse_size

PROTOCOLS = ("windows", "sliding", "c4", "c4-new")
# What can be measured, and what needs the original beside it.
TEXT_METRICS, TEXT_AGAINST = ("ppl",), ("ppl_increase", "kl", "kl_median", "kl_p999", "top1", "top5")
BYTE_METRICS, BYTE_AGAINST = ("bpb",), ("bpb_increase",)
IMAGE_METRICS, IMAGE_AGAINST = ("ppl",), ("ppl_increase", "kl", "top1")
MEASURED_SAMPLES = 64
CACHE_LIMIT, BATCH_SIZE = "20GB", 1

_TEXT: tuple[Decorator, ...] = (
    click.option("--against", metavar="ORIGINAL", help="The unquantized model: folder or hub name."),
    click.option(
        "--protocol",
        type=click.Choice(PROTOCOLS),
        help="How perplexity is measured.  [default: windows; of --text c4 and c4-new their own]",
    ),
    click.option(
        "--stride",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens a sliding window moves on; implies --protocol sliding.  [default: 512, or half the window]",
    ),
    click.option(
        "--window",
        type=click.IntRange(min=2),
        metavar="N",
        help="Tokens a window.  [default: 2048, or the model's context; 512 for the divergence]",
    ),
    click.option(
        "--max-windows", type=click.IntRange(min=1), metavar="N", help="Stop after so many windows.  [default: all]"
    ),
    click.option("--cache", metavar="DIR", help="Keep the original's logits there, for the next candidate."),
    click.option("--cache-limit", metavar="SIZE", default=CACHE_LIMIT, help="Of --cache: the most it may hold."),
)
_BYTES: tuple[Decorator, ...] = (
    click.option(
        "--bits-per-byte",
        is_flag=True,
        help="Measure bits per UTF-8 byte instead, by subset, streamed.",
    ),
    click.option("--include", metavar="A,B", help="Of --bits-per-byte: only these subsets (meta.pile_set_name)."),
    click.option("--exclude", metavar="A,B", help="Of --bits-per-byte: all subsets but these."),
    click.option(
        "--max-documents", type=click.IntRange(min=1), metavar="N", help="Of --bits-per-byte: stop after so many."
    ),
)
_IMAGES: tuple[Decorator, ...] = (
    click.option(
        "--images",
        metavar="FOLDER|FILE|DATASET",
        help="Measure on these images with captions instead: a folder, a file of messages, a hub dataset.",
    ),
    click.option(
        "--measure",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"Of --images: at most so many samples.  [default: {MEASURED_SAMPLES}]",
    ),
)
_TASKS: tuple[Decorator, ...] = (
    click.option(
        "--tasks",
        metavar="A,B",
        help="Tasks of lm-evaluation-harness, or FILE.py:function of your own: hellaswag,metrics.py:accuracy.",
    ),
    click.option("--task-folder", metavar="DIR", help="Of --tasks: task files (YAML) of your own."),
    click.option("--few-shot", type=click.IntRange(min=0), metavar="N", help="Of --tasks.  [default: the task's own]"),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Of --tasks: so many questions of each."),
    click.option("--batch-size", type=click.IntRange(min=1), metavar="N", default=BATCH_SIZE, help="Of --tasks."),
    click.option("--confirm-run-unsafe-code", "allow_code", is_flag=True, help="Of --tasks: run code a model writes."),
    click.option(
        "--gate",
        "gates",
        metavar="CONDITION",
        multiple=True,
        help="Exit with 5 unless it holds: 'ppl_increase<1%', 'kl<0.02'. Repeatable.",
    ),
)


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; the fields are its options."""

    source: str | None = None
    split: str | None = None
    against: str | None = None
    protocol: str | None = None
    stride: int | None = None
    window: int | None = None
    max_windows: int | None = None
    cache: str | None = None
    cache_limit: str = CACHE_LIMIT
    bits_per_byte: bool = False
    include: str | None = None
    exclude: str | None = None
    max_documents: int | None = None
    images: str | None = None
    measure: int | None = None
    tasks: str | None = None
    task_folder: str | None = None
    few_shot: int | None = None
    limit: int | None = None
    batch_size: int = BATCH_SIZE
    allow_code: bool = False
    gates: tuple[str, ...] = ()

    @property
    def task_names(self) -> list[str]:
        """What --tasks lists."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    @property
    def wants_text(self) -> bool:
        """Whether perplexity is measured: unless something else was asked for, and nothing of it."""
        if self.bits_per_byte or self.images:
            return False
        return not self.tasks or bool(self.source or self.against or self.protocol)

    @property
    def method(self) -> str:
        """The protocol: as it was named, else that of the text."""
        if self.protocol is not None:
            return self.protocol
        return "sliding" if self.stride else self.source if self.source in ("c4", "c4-new") else "windows"

    @property
    def metrics(self) -> set[str]:
        """Names of what will be measured, but for those of tasks."""
        found: set[str] = set()
        if self.wants_text:
            found |= {*TEXT_METRICS, *(TEXT_AGAINST if self.against else ())}
        if self.bits_per_byte:
            found |= {*BYTE_METRICS, *(BYTE_AGAINST if self.against else ())}
        if self.images:
            found |= {*IMAGE_METRICS, *(IMAGE_AGAINST if self.against else ())}
        return found

    def check(self) -> None:
        """Raises click.UsageError where options contradict one another or lack another, ConfigError for no size."""
        parse_size(self.cache_limit)
        text = self.source or self.split or self.bits_per_byte or self.protocol or self.stride
        text = text or self.window or self.max_windows
        lacking = [
            (self.images and text, "--images is measured on its own: leave the options of text out"),
            (self.measure and not self.images, "--measure is of --images"),
            (self.bits_per_byte and self.source is None, "--bits-per-byte needs --text"),
            (self.bits_per_byte and (self.protocol or self.stride), "--bits-per-byte has a protocol of its own"),
            (self.stride and self.protocol not in (None, "sliding"), "--stride is of --protocol sliding"),
            (self.cache and self.against is None, "--cache keeps what --against names, which is missing"),
            (self.cache_limit != CACHE_LIMIT and not self.cache, "--cache-limit is of --cache"),
            (self.cache and not self.wants_text, "--cache is of the divergence on text"),
            (self.task_folder and not self.tasks, "--task-folder needs --tasks"),
            (self.tasks is not None and not self.task_names, "--tasks names none"),
        ]
        names = {"--include": self.include, "--exclude": self.exclude, "--max-documents": self.max_documents}
        lacking += [
            (value and not self.bits_per_byte, f"{name} is of --bits-per-byte") for name, value in names.items()
        ]
        for wrong, words in lacking:
            if wrong:
                raise click.UsageError(words)


def eval_options(command: Any) -> Any:
    """All options but those other commands have too."""
    for option in reversed(_TEXT + _BYTES + _IMAGES + _TASKS):
        command = option(command)
    return command
