"""`awq plugins new`: a plugin for a model that nobody claims, as a distribution with tests that pass."""

from __future__ import annotations

from pathlib import Path

import click

from awq_core.cli.options import json_option, trust_option
from awq_core.cli.output import note, print_json


@click.command(
    "new",
    epilog="""\b
Examples:
  awq plugins new acorn --from-model MODEL
  awq plugins new acorn --from-model MODEL/config.json --out DIR
\b
The architecture is inferred on a tiny random model and proved; nothing of the
weights is read. Then: pip install -e DIR, and pytest in it.
""",
)
@click.argument("family")
@click.option("--from-model", "model", required=True, metavar="MODEL", help="Folder, config.json or hub name.")
@click.option("--out", metavar="DIR", help="Folder to write, new or empty.  [default: awq-plugin-FAMILY]")
@trust_option
@json_option
def new_command(family: str, model: str, out: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Write a plugin for FAMILY whose scale groups are inferred from MODEL's configuration."""
    from dataclasses import asdict

    from awq_core.hooks.manager import default_manager
    from awq_core.inference import infer
    from awq_core.model_folder import load_config, resolve
    from awq_core.scaffold import config_for_tests, write_plugin

    source = Path(model).parent if Path(model).name == "config.json" else Path(resolve(model, weights=False))
    config = load_config(source, trust_remote_code=trust_remote_code)
    found = infer(config, family=family, trust_remote_code=trust_remote_code)
    written = write_plugin(family, found, Path(out) if out else None, tiny=config_for_tests(config, found))
    for info in default_manager().plugins:
        if config.model_type in info.model_types:
            note(f"note: {info.label} claims {config.model_type!r} too; where both are installed, one must be named")
    if as_json:
        print_json(
            {
                "folder": written.folder,
                "files": list(written.files),
                "model_type": config.model_type,
                "proved": found.proved,
                "why_not": found.why_not,
                "proof_error": found.proof.error,
                "control": found.control,
                "coverage": round(found.coverage, 4),
                "unscaled": [asdict(one) for one in found.unscaled],
                "unreached": list(found.unreached),
            }
        )
        return
    click.echo(f"{written.folder}: {', '.join(written.files)}")
    proof = f"{found.proof.groups} scale groups proved, error {found.proof.error:.1e}, coverage {found.coverage:.1%}"
    click.echo(f"not proved: {found.why_not}" if found.why_not else proof)
    for one in found.unscaled:
        click.echo(f"no scales for {one.linear}: {one.why}")
    for parameter in found.unreached:
        click.echo(f"stays as it is: {parameter}")
    note(f"next: pip install -e {written.folder} && pytest {written.folder}")
