"""Runs the cases in a process of their own: whether kernels are interpreted is settled when triton is imported."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

CASES = [str(file) for file in sorted(Path(__file__).parent.glob("triton_*cases.py"))]


def version(package):
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


def run(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_in_the_interpreter():
    if version("triton") < Version("3.7") and version("numpy") >= Version("2.4"):
        pytest.skip("the interpreter of this triton cannot loop with this numpy")
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_on_a_gpu():
    version("triton")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    run(TRITON_INTERPRET="0")


def test_triton_is_not_imported_before_it_is_used():
    names = "awq_core.kernels, awq_core.kernels.triton.layout, awq_core.kernels.triton.tiles"
    code = f"import sys, {names}; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
