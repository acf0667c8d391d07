"""The kit on packages it has never seen: two that are right pass, and one with a forgotten reader fails by its name."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("unseen_packages", Path(__file__).with_name("packages.py"))
packages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(packages)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    packages.install(folder)
    return folder


def run(site: Path, plugins: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWQ_")}
    env |= {"PYTHONPATH": str(site), "AWQ_PLUGINS": plugins, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=site, env=env, capture_output=True, text=True, check=False)


def test_two_unseen_packages_pass_the_kit(site):
    done = run(site, "rowan,tamarack", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_a_forgotten_reader_is_named(site):
    done = run(site, "rowan_faulty", "awq_core.cli", "plugins", "check", "awq-plugin-rowan-faulty", "--json")
    assert done.returncode == 4, done.stderr
    answer = json.loads(done.stdout)
    assert answer["plugin"] == "rowan_faulty" and not answer["passed"] and answer["cases"] == ["rowan"]
    failed = {one["test"]: one for one in answer["results"] if one["outcome"] == "failed"}
    assert set(failed) == {
        "test_function_is_preserved",
        "test_quantize_save_load_generate",
        "test_int4_kernel_agrees_in_bfloat16",
    }
    preserved = failed["test_function_is_preserved"]
    assert preserved["case"] == "rowan" and preserved["todo"].startswith("If this fails: ")
    assert "mlp.gate reads post_attention_layernorm too; add it to layers, or to compensate" in preserved["message"]
    passed = {one["test"] for one in answer["results"] if one["outcome"] == "passed"}
    assert {"test_import_is_light", "test_claims_the_model", "test_coverage_of_parameters"} <= passed
