"""Tables in Markdown from the numbers of an accuracy benchmark, nothing else needed.

With k_w the divergence in window w of n of a method, o_w that of our run, and l_w, m_w their losses, all on the same
windows, each number stands beside its standard error:

    KL                 mean k                 std(k) / √n
    KL - ours          mean (k - o)           std(k - o) / √n
    KL / ours          r = mean k / mean o    std(k - r·o) / (√n · mean o)     (ratio estimator, Cochran 1977, eq. 6.13)
    perplexity / ours  q = exp(mean (l - m))  q · std(l - m) / √n
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from awq_core.evaluation.paired import Estimate, estimate, paired, perplexities
from peers.environments import RUNS
from peers.results import ORIGINAL, Key, Record
from peers.running import markdown

HEADER = ("method", "settings", "MB", "KL", "KL - ours", "KL / ours", "same token", "perplexity", "perplexity / ours")
# Our KL, at most this part of theirs.
TARGETS = {
    "autoawq": 1 / 3,
    "autoawq:no-clip": 1 / 3,
    "llmcompressor": 1 / 3,
    "gptqmodel:gptq": 2 / 3,
    "gptqmodel:gptq-asymmetric": 2 / 3,
}


def values(record: Record, name: str) -> torch.Tensor:
    """[windows], "nll", "kl" or "agreement"."""
    return torch.tensor(record[name], dtype=torch.float64)


def ratio(a: torch.Tensor, b: torch.Tensor) -> Estimate:
    """mean a / mean b of pairs `[windows]`."""
    found = float(a.mean() / b.mean())
    return Estimate(found, estimate(a - found * b).stderr / abs(float(b.mean())))


def perplexity_ratio(a: torch.Tensor, b: torch.Tensor) -> Estimate:
    """exp(mean a - mean b) of pairs of losses `[windows]`."""
    difference = paired(a, b).difference
    found = math.exp(difference.mean)
    return Estimate(found, found * difference.stderr)


def shown(value: Estimate, form: str) -> str:
    return f"{value.mean:{form}} ± {value.stderr:{form.removeprefix('+')}}"


def method_row(record: Record, ours: Record | None) -> tuple[str, ...]:
    """One method on one text. Without `ours`, or if that failed, nothing is compared with it."""
    about = (record["run"], ", ".join(text for text in (record.get("settings"), record.get("version")) if text))
    if "failed" in record:
        reason = record["failed"].replace("|", "/").replace("\n", " ")
        return (*about, "", f"failed: {reason}", *[""] * 5)
    size = f"{record['bytes'] / 1e6:.1f}" if "bytes" in record else ""
    perplexity = shown(estimate(perplexities(values(record, "nll"))), ".3f")
    if record["run"] == ORIGINAL:
        return (*about, size, *[""] * 4, perplexity, "")
    kl = values(record, "kl")
    against = ("", "", "")
    if ours is record:
        against = ("", "1", "1")
    elif ours is not None:
        other = values(ours, "kl")
        worse = perplexity_ratio(values(record, "nll"), values(ours, "nll"))
        against = (shown(paired(kl, other).difference, "+.5f"), shown(ratio(kl, other), ".2f"), shown(worse, ".4f"))
    same = shown(estimate(100 * values(record, "agreement")), ".2f") + " %"
    return (*about, size, shown(estimate(kl), ".5f"), *against[:2], same, perplexity, against[2])


def usable(record: Record | None) -> Record | None:
    return record if record is not None and "failed" not in record else None


def target_rows(groups: Sequence[tuple[Key, dict[str, Record]]], ours: str) -> list[tuple[str, ...]]:
    """Our KL and perplexity as a part of others', header first; what misses its target is bold."""
    present = [peer for peer in TARGETS if any(usable(runs.get(peer)) for _, runs in groups)]

    def cell(value: Estimate, limit: float, form: str) -> str:
        return f"**{shown(value, form)}**" if value.mean > limit else shown(value, form)

    lines = []
    for key, runs in groups:
        mine, cells = usable(runs.get(ours)), []
        for peer in present:
            other = usable(runs.get(peer))
            if mine is None or other is None:
                cells += ["", ""]
                continue
            cells.append(cell(ratio(values(mine, "kl"), values(other, "kl")), TARGETS[peer], ".2f"))
            cells.append(cell(perplexity_ratio(values(mine, "nll"), values(other, "nll")), 1.0, ".4f"))
        lines.append((key.model, key.text, str(key.group_size), *cells))
    titles = [title for peer in present for title in (f"KL / {peer} (≤ {TARGETS[peer]:.2f})", f"perplexity / {peer}")]
    return [("model", "text", "group size", *titles), *lines]


def by(key: Callable[[Key], Key], records: dict[Key, Record]) -> dict[Key, dict[str, Record]]:
    """{what `key` leaves of a key: {run: record}}, in the order of the file."""
    found: dict[Key, dict[str, Record]] = {}
    for one, record in records.items():
        found.setdefault(key(one), {})[one.run] = record
    return found


def current(records: dict[Key, Record]) -> dict[Key, Record]:
    """Of each model only the weights measured last."""
    latest = {key.model: key.weights for key in records}
    return {key: record for key, record in records.items() if key.weights == latest[key.model]}


def report(records: dict[Key, Record], ours: str) -> str:
    """All tables: the targets, then a section a model with a table a text and group size."""
    records = current(records)
    tables = by(lambda key: key.of_run("", key.group_size, key.text), records)
    originals = {key: runs[ORIGINAL] for key, runs in tables.items() if ORIGINAL in runs}
    groups = [(key, runs) for key, runs in tables.items() if ORIGINAL not in runs]
    parts = [f"## {ours} as a part of others", markdown(target_rows(groups, ours))] if _compared(groups, ours) else []
    for section in dict.fromkeys(key.of_run("", 0, "") for key, _ in groups):
        parts += [f"## {section.model}", f"Calibrated on {section.calibration}; measured on {section.windows}."]
        for key, runs in groups:
            if key.of_run("", 0, "") == section:
                original = originals.get(key.of_run("", 0, key.text))
                mine = usable(runs.get(ours))
                rows = [method_row(record, mine) for record in ([original] if original else []) + ordered(runs)]
                parts += [f"### {key.model}: {key.text}, groups of {key.group_size}", markdown([HEADER, *rows])]
    return "\n\n".join(parts) + "\n"


def _compared(groups: Iterable[tuple[Key, dict[str, Record]]], ours: str) -> bool:
    return any(
        usable(runs.get(ours)) and set(TARGETS) & {peer for peer in runs if usable(runs[peer])} for _, runs in groups
    )


def ordered(runs: dict[str, Record]) -> list[Record]:
    """In the order of the runs' list, then those that it does not have."""
    place = {run.name: number for number, run in enumerate(RUNS)}
    return sorted(runs.values(), key=lambda record: place.get(record["run"], len(place)))
