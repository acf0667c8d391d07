"""`awq export` and `awq import`: the lines they print, and what they refuse."""

import subprocess
import sys

from awq_core.export.formats import FORMATS


def test_export_and_import(awq, quantized, tmp_path, read_json):
    result = awq("export", quantized, "--to", "compressed-tensors", "--out", tmp_path / "ct")
    assert result.stdout.count("\n") == 1 and "compressed-tensors, 14 linears converted" in result.stdout
    done = read_json(awq("import", tmp_path / "ct", "--out", tmp_path / "awq", "--json"))
    size = sum(path.stat().st_size for path in (tmp_path / "awq").iterdir())
    assert done == {"out": str(tmp_path / "awq"), "format": "awq", "linears": 14, "bytes": size}
    again = (tmp_path / "awq" / "model.safetensors").read_bytes()
    assert again == (quantized / "model.safetensors").read_bytes()


def test_8_bits(awq, quantized, tmp_path, read_json):
    """The head is the one linear that was kept."""
    plain = read_json(awq("export", quantized, "--to", "compressed-tensors", "--out", tmp_path / "a", "--json"))
    command = ("export", quantized, "--to", "compressed-tensors", "--eight-bit", "lm_head", "--out")
    result = awq(*command, tmp_path / "b")
    assert "14 linears converted, 1 kept one in 8 bits, " in result.stdout and result.stdout.count("\n") == 1
    (line,) = result.errors
    assert line.startswith("note: transformers loads it after awq_core.integrations.compressed_tensors.enable()")
    done = read_json(awq(*command, tmp_path / "c", "--json"))
    assert done["eight_bit"] == ["lm_head"] and done["linears"] == 14 and "eight_bit" not in plain
    assert plain["bytes"] - done["bytes"] > 128 * 64  # a byte of each weight, at least
    for options, words in (
        (("--eight-bit", "*"), "no linear of the blocks was kept"),
        (("--to", "gptq_v2"), "--to gptq_v2 holds no linears of 8 bits - try: --to compressed-tensors"),
    ):
        (line,) = awq(*command, tmp_path / "d", *options, code=2).errors
        assert words in line
    assert not (tmp_path / "d").exists()


def test_a_pickle_comes_with_a_warning(awq, quantized, tmp_path):
    result = awq("export", quantized, "--to", "torch", "--out", tmp_path / "x")
    (line,) = result.errors
    assert line.startswith("warning: model.pt is a pickle") and "weights_only=True" in line


def test_what_is_refused(awq, quantized, llama_source, tmp_path):
    result = awq("export", quantized, "--to", "exl2", "--out", tmp_path / "x", code=2)
    assert "'exl2' is not one of" in result.stderr and "'gptq_v2'" in result.stderr
    (line,) = awq("export", llama_source, "--to", "gptq", "--out", tmp_path / "x", code=1).errors
    assert "is not quantized" in line and "awq quantize" in line
    (line,) = awq("import", tmp_path / "nothing", "--out", tmp_path / "x", code=1).errors
    assert "no such model folder" in line
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("a")
    (line,) = awq("export", quantized, "--out", tmp_path / "x", code=1).errors
    assert "not empty" in line and "--out" in line


def test_help_lists_the_formats_and_imports_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from awq_core.cli.app import cli;"
        "print(CliRunner().invoke(cli, ['export', '--help']).output);"
        "CliRunner().invoke(cli, ['import', '--help']);"
        "print('HEAVY', sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in shown for name in FORMATS)
    assert "HEAVY []" in shown
