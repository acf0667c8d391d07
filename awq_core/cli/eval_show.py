"""The result of `awq eval` for the eye."""

from __future__ import annotations

import math
from typing import Any

import click

from awq_core.cli.output import plural


def tell(result: dict[str, Any]) -> None:
    """Every part that was measured, each with its protocol; then the gates."""
    if result["perplexity"]:
        _text(result["perplexity"], result["against"])
    if "bits_per_byte" in result:
        _bytes(result["bits_per_byte"])
    if "images" in result:
        _images(result["images"])
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


def _images(mine: dict[str, Any]) -> None:
    against = mine["against"]
    click.echo(f"perplexity   {_pm(mine['perplexity'], 4)}")
    if against:
        increase = mine["perplexity"]["mean"] / against["perplexity"]["mean"] - 1
        click.echo(f"original     {_pm(against['perplexity'], 4)}")
        click.echo(f"difference   {_pm(against['difference'], 4, '+')} ({increase:+.2%})")
        click.echo(f"KL           {_pm(against['kl'], 5)} nats a token")
        click.echo(f"agreement    {_pm(against['agreement'], 2, '', '%')} of likeliest tokens are the same")
    click.echo(
        f"protocol     text tokens given images, mean over samples, ± standard error; "
        f"{plural(mine['samples'], 'sample')} of {mine['source']}, {plural(mine['tokens'], 'token')} predicted"
    )


def _pm(value: dict[str, float], digits: int, sign: str = "", kind: str = "f") -> str:
    """Without the error where there is none: one sample."""
    error = value["stderr"]
    return f"{value['mean']:{sign}.{digits}{kind}}" + ("" if math.isnan(error) else f" ± {error:.{digits}{kind}}")


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
