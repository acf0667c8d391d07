"""In which forward passes of a block its linears' inputs are observed, so that few Gram matrices exist at once.

A Gram matrix is `[in, in]` in fp32. A dense block has a handful; a mixture has one more for every expert, since each
expert's last linear reads a tensor of its own: 256 experts with 2048 inputs need 4 GiB. So

    pass 0      everything outside the mixture, in one forward of the block
    pass 1...   some experts of the mixture, as many as have Gram matrices of `CHUNK_BYTES` together

and the linears that a pass completes are worked, and their Gram matrices dropped, before the next one begins. A later
pass runs the block's part before the mixture again and only the chosen experts: a few percent of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from awq_core.plan_types import BlockPlan

# Enough for a hundred experts of 768 inputs; a single larger Gram matrix makes a pass of its own.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Site:
    """One distinct input: the module whose input it is (path in the block), the linears that read it, its width."""

    module: str
    readers: tuple[str, ...]
    width: int

    @property
    def nbytes(self) -> int:
        """Size of its Gram matrix."""
        return self.width * self.width * 4


@dataclass(frozen=True, slots=True)
class Pass:
    """Sites observed together. `mixture` is the module they are all in, by its path in the block, or None where they
    are outside every mixture."""

    sites: tuple[Site, ...]
    mixture: str | None = None

    @property
    def experts(self) -> frozenset[str]:
        """Names of the mixture's children that hold the sites."""
        start = len(self.mixture) + 1 if self.mixture else 0
        return frozenset(site.module[start:].partition(".")[0] for site in self.sites)


def passes(plan: BlockPlan) -> tuple[Pass, ...]:
    """The passes that observe every quantized linear of a block, in the order in which they are made."""
    outside: list[Site] = []
    inside: dict[str, list[Site]] = {}
    for site in _sites(plan):
        mixtures = [path for path in plan.mixtures if not path or site.module.startswith(path + ".")]
        (inside.setdefault(max(mixtures, key=len), []) if mixtures else outside).append(site)
    result = [Pass(tuple(outside))] if outside else []
    for mixture, sites in inside.items():
        chunk: list[Site] = []
        for site in sites:
            if chunk and sum(one.nbytes for one in (*chunk, site)) > CHUNK_BYTES:
                result.append(Pass(tuple(chunk), mixture))
                chunk = []
            chunk.append(site)
        result.append(Pass(tuple(chunk), mixture))
    return tuple(result)


def gram_bytes(plan: BlockPlan) -> int:
    """The most that Gram matrices of one block take at once, if each is dropped when its readers are finished.

    Scale groups are searched in their order. A linear is finished once its input was observed and every group that
    scales it, its columns or its rows, was searched: a mixture's `up` waits for the `down` that reads it.
    """
    made = passes(plan)
    begun = {reader: number for number, one in enumerate(made) for site in one.sites for reader in site.readers}
    ended = dict(begun)
    latest = 0
    for group in plan.groups:
        latest = max(latest, begun[group.layers[0]])
        for name in (group.prev, *group.layers):
            if name in ended:
                ended[name] = max(ended[name], latest)
    alive = [0] * len(made)
    for number, one in enumerate(made):
        for site in one.sites:
            for later in range(number, max(ended[reader] for reader in site.readers) + 1):
                alive[later] += site.nbytes
    return max(alive, default=0)


def _sites(plan: BlockPlan) -> list[Site]:
    """The readers of a scale group share one site; a linear outside every group has its own. In the groups' order."""
    widths = {linear.name.removeprefix(plan.path).removeprefix("."): linear.in_features for linear in plan.quantized}
    sites = [Site(group.observe, group.layers, widths[group.layers[0]]) for group in plan.groups]
    grouped = {name for group in plan.groups for name in group.layers}
    return sites + [Site(name, (name,), width) for name, width in widths.items() if name not in grouped]
