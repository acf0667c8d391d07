"""The result of `awq eval` for the eye."""

from __future__ import annotations

from typing import Any

import click


def tell(result: dict[str, Any]) -> None:
    """Every part that was measured, each with its protocol; then the gates."""
    if result["perplexity"]:
        _text(result["perplexity"], result["against"])
    if "bits_per_byte" in result:
        _bytes(result["bits_per_byte"])
    if "tasks" in result:
        _tasks(result["tasks"])
    for gate in result.get("gates", ()):
        click.echo(f"gate         {gate['gate']}: {'met' if gate['met'] else 'NOT MET'}, {gate['value']:.6g}")


def _text(mine: dict[str, Any], against: dict[str, Any] | None) -> None:
    click.echo(f"perplexity   {mine['perplexity']:.4f}")
    if against:
        theirs, apart = against["perplexity"]["perplexity"], against["divergence"]
        error = "" if apart["kl_stderr"] is None else f" ± {apart['kl_stderr']:.5f}"
        click.echo(f"original     {theirs:.4f}")
        click.echo(f"difference   {against['difference']:+.4f} ({mine['perplexity'] / theirs - 1:+.2%})")
        click.echo(f"KL           {apart['kl_mean']:.5f}{error} nats a token, median {apart['kl_median']:.5f}")
        ends = apart["intervals"].get("kl_p999")
        spread = f", 95 % interval {ends[0]:.5f} to {ends[1]:.5f}" if ends else ""
        click.echo(f"KL 99.9 %    {apart['kl_p999']:.5f}{spread}")
        click.echo(f"agreement    {_share(apart, 'top1_agreement')} of likeliest tokens are the same")
        click.echo(f"top 5        {_share(apart, 'top5_agreement')} of the five likeliest are shared")
    click.echo(f"protocol     {mine['protocol']}; {mine['tokens']} tokens predicted")
    if against:
        click.echo(f"             KL and agreement: {apart['windows']} windows of {apart['window']} tokens")


def _share(apart: dict[str, Any], name: str) -> str:
    ends = apart["intervals"].get(name)
    return f"{apart[name]:.2%}" + (f" ({ends[0]:.2%} to {ends[1]:.2%})" if ends else "")


def _bytes(mine: dict[str, Any]) -> None:
    theirs = mine["against"]
    width = max([len("bits per byte"), *map(len, mine["subsets"])])
    rows = [*mine["subsets"].items(), ("bits per byte", mine)]
    for name, row in rows:
        words = ""
        if theirs:
            original = (theirs if row is mine else theirs["subsets"][name])["bits_per_byte"]
            words = f"  original {original:.4f} ({row['bits_per_byte'] / original - 1:+.2%})"
        share = f"{row['weight']:.1%} of {mine['bytes']} bytes, {row['documents']} documents"
        click.echo(f"{name:{width}}  {row['bits_per_byte']:.4f}{words}  {share}")
    click.echo(f"{'protocol':{width}}  {mine['protocol']}; total: subsets weighted by their bytes")


def _tasks(tasks: dict[str, Any]) -> None:
    width = max(map(len, tasks["metrics"]), default=0)
    for name, row in tasks["metrics"].items():
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        click.echo(f"{name:{width}}  {row['value']:.4f}{error}")
    click.echo(f"{'protocol':{width}}  {tasks['protocol']}")
