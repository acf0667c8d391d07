"""A user's own metric: found, called with the model in evaluation mode, its answer checked."""

import pytest

from awq_core.errors import AwqError, ConfigError
from awq_core.evaluation.custom import custom_metric, is_custom, name_of


@pytest.fixture
def task(tmp_path):
    def write(text, name="metric"):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return f"{path}:{name}"

    return write


def test_numbers(task, model, tokenizer):
    model.train()
    written = task(
        "import numpy\n"
        "def metric(model, tokenizer):\n"
        "    assert not model.training\n"
        "    ids = tokenizer('w3 w4')['input_ids']\n"
        "    return {'tokens': len(ids), 'half': numpy.float32(0.5)}\n"
    )
    assert is_custom(written) and not is_custom("hellaswag") and name_of(written) == "metric"
    assert custom_metric(written, model, tokenizer) == {"tokens": 3.0, "half": 0.5}
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("def other(m, t): pass", ConfigError, "no function 'metric'"),
        ("metric = 3", ConfigError, "no function 'metric'"),
        ("def metric(m, t): return 0.5", AwqError, "returned float"),
        ("def metric(m, t): return {}", AwqError, "not a dict of numbers"),
        ("def metric(m, t): return {'a': 'b'}", AwqError, "'a': 'b'"),
        ("def metric(m, t): return {'a': True}", AwqError, "not a finite number"),
        ("def metric(m, t): return {'a': float('nan')}", AwqError, "nan"),
        ("def metric(m, t): return {3: 1}", AwqError, "3: 1"),
        ("def metric(m, t): raise ValueError('no data')", AwqError, "ValueError: no data"),
        ("def metric(m, t)", AwqError, "cannot be run: SyntaxError"),
        ("import no_such_module", AwqError, "cannot be run: ModuleNotFoundError"),
    ],
)
def test_failures_are_one_line(task, model, tokenizer, text, error, words):
    with pytest.raises(error, match=r"mine\.py") as caught:
        custom_metric(task(text), model, tokenizer)
    assert words in caught.value.message and type(caught.value) is error


def test_no_such_file(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        custom_metric(f"{tmp_path}/none.py:metric", model, tokenizer)
