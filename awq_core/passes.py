"""In which forward passes of a block its linears' inputs are observed, so that few Gram matrices exist at once.

A Gram matrix is `[in, in]` in fp32. A dense block has a handful; a mixture has three more for every expert: of what its
last linear reads, over all tokens and over its own, and of what its first ones read, over its own (over all tokens
that one is shared with the other experts). 256 experts with 2048 inputs everywhere would need 12 GiB. So

    pass 0      everything outside the mixture, in one forward of the block
    pass 1...   some experts of the mixture, as many as have Gram matrices of `CHUNK_BYTES` together

and the linears that a pass completes are worked, and their Gram matrices dropped, before the next one begins. A later
pass runs the block's part before the mixture again and only the chosen experts: a few percent of the time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from awq_core.plan_types import BlockPlan

# Enough for a dozen experts of a 2048-wide layer that are 768 wide inside; a single larger one makes a pass of its own.
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
    """Sites observed together.

    Attributes:
        sites: observed over all tokens.
        mixture: the module they are all in, by its path in the block; None where they are outside every mixture.
        routed: observed over the tokens that the router sends to an expert; the readers are that expert's.
        complete: linears whose statistics are complete with this pass. An expert's are when its own tokens were seen.
    """

    sites: tuple[Site, ...]
    mixture: str | None
    routed: tuple[Site, ...]
    complete: tuple[str, ...]

    @property
    def experts(self) -> frozenset[str]:
        """Names of the mixture's children that hold the sites."""
        return frozenset(self.expert(site.module) for site in (*self.sites, *self.routed))

    def expert(self, path: str) -> str:
        """Name of the mixture's child that holds the module at `path`, relative to the block."""
        return _below(self.mixture or "", path)


def passes(plan: BlockPlan) -> tuple[Pass, ...]:
    """The passes that observe every quantized linear of a block, in the order in which they are made."""
    outside: list[Site] = []
    # By expert: what is observed in it over all tokens, and over its own.
    inside: defaultdict[tuple[str, str], tuple[list[Site], list[Site]]] = defaultdict(lambda: ([], []))
    for site in _sites(plan):
        home = _expert(plan, site.module)
        (outside if home is None else inside[home][0]).append(site)
        readers: defaultdict[tuple[str, str] | None, list[str]] = defaultdict(list)
        for name in site.readers:
            readers[_expert(plan, name)].append(name)
        for expert, names in readers.items():
            if expert is not None:
                module = site.module if expert == home else names[0]
                inside[expert][1].append(Site(module, tuple(names), site.width))
    late = {name for _, own in inside.values() for site in own for name in site.readers}

    def made(mixture: str | None, sites: list[Site], routed: list[Site]) -> Pass:
        complete = [name for site in routed for name in site.readers]
        complete += [name for site in sites for name in site.readers if name not in late]
        return Pass(tuple(sites), mixture, tuple(routed), tuple(complete))

    result = [made(None, outside, [])] if outside else []
    for mixture in dict.fromkeys(mixture for mixture, _ in inside):
        sites: list[Site] = []
        routed: list[Site] = []
        for every, own in (found for (where, _), found in inside.items() if where == mixture):
            if (sites or routed) and sum(site.nbytes for site in (*sites, *routed, *every, *own)) > CHUNK_BYTES:
                result.append(made(mixture, sites, routed))
                sites, routed = [], []
            sites, routed = sites + every, routed + own
        result.append(made(mixture, sites, routed))
    return tuple(result)


def gram_bytes(plan: BlockPlan) -> int:
    """The most that Gram matrices of one block take at once, if each is dropped when its readers are finished.

    Scale groups are searched in their order. A linear is finished once its statistics are complete and every group that
    scales it, its columns or its rows, was searched: a mixture's `up` waits for the `down` that reads it. A matrix over
    all tokens that only one expert reads is dropped as soon as it is mixed with the one over the expert's own tokens;
    where others read it too, the mixed one is made when it is needed.
    """
    made = passes(plan)
    begun = {name: number for number, one in enumerate(made) for name in one.complete}
    ended = dict(begun)
    latest = 0
    for group in plan.groups:
        latest = max(latest, begun[group.layers[0]])
        for name in (group.prev, *group.layers):
            if name in ended:
                ended[name] = max(ended[name], latest)
    kept = [0] * len(made)  # from earlier passes
    most = 0
    for number, one in enumerate(made):
        mixed_at_once = {site.readers for site in one.sites} & {site.readers for site in one.routed}
        every = sum(site.nbytes for site in one.sites)
        dropped = sum(site.nbytes for site in one.sites if site.readers in mixed_at_once)
        mixing = max((site.nbytes for site in one.routed if site.readers not in mixed_at_once), default=0)
        own = sum(site.nbytes for site in one.routed)
        most = max(most, kept[number] + every + own + max(0, mixing - dropped))
        for site in (*one.routed, *(site for site in one.sites if site.readers not in mixed_at_once)):
            for later in range(number + 1, max(ended[reader] for reader in site.readers) + 1):
                kept[later] += site.nbytes
    return most


def _expert(plan: BlockPlan, path: str) -> tuple[str, str] | None:
    """The (innermost) mixture and the child of it that a module is in, or None where it is outside every mixture."""
    mixtures = [mixture for mixture in plan.mixtures if not mixture or path.startswith(mixture + ".")]
    if not mixtures:
        return None
    mixture = max(mixtures, key=len)
    return mixture, _below(mixture, path)


def _below(mixture: str, path: str) -> str:
    return path[len(mixture) + 1 if mixture else 0 :].partition(".")[0]


def _sites(plan: BlockPlan) -> list[Site]:
    """The readers of a scale group share one site; a linear outside every group has its own. In the groups' order."""
    widths = {plan.local(linear): linear.in_features for linear in plan.quantized}
    sites = [Site(group.observe, group.layers, widths[group.layers[0]]) for group in plan.groups]
    grouped = {name for group in plan.groups for name in group.layers}
    return sites + [Site(name, (name,), width) for name, width in widths.items() if name not in grouped]
