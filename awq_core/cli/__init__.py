"""The command line: `awq`, also installed as `awq-cli`. One file a command; `app.py` finds them and answers errors."""

from __future__ import annotations


def main() -> None:
    """Run the command that `sys.argv` names; the entry point of both programs."""
    from awq_core.cli.app import cli

    cli(prog_name="awq")
