"""Tasks through lm-evaluation-harness, offline, on a task of our own, against a direct computation."""

import json

import pytest
import torch

from awq_core.errors import AwqError, ConfigError
from awq_core.evaluation import run_tasks
from awq_core.evaluation.tasks import TaskMetric, metrics_of


def test_names_of_metrics():
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 3},
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "name": "x"},
    }
    assert metrics_of(results) == {
        "arc.acc": TaskMetric(0.5, 0.1),
        "gsm8k.exact_match.strict-match": TaskMetric(0.25, None),
    }


def test_without_lm_eval(monkeypatch, model, tokenizer):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match="need lm-eval") as caught:
        run_tasks(model, tokenizer, ["arc"])
    assert "awq-core[eval]" in caught.value.hint


YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": f"w{i} w{i + 1} w{i + 2}", "choices": [f"w{i + 3}", f"w{30 - i}", f"w{i}"], "answer": i % 3}
    for i in range(1, 13)
]


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A folder with one task; nothing may be fetched."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "words.yaml").write_text(YAML.format(name="awq_words", data=data))
    (folder / "gone.yaml").write_text(YAML.format(name="awq_gone", data=folder / "gone.jsonl"))
    return folder


def accuracy(model):
    """Share of questions whose right choice has the largest log-probability after <s> and the question."""
    right = 0
    for question in QUESTIONS:
        prefix = [0, *(int(word[1:]) for word in question["question"].split())]
        scores = []
        for choice in question["choices"]:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([prefix])).logits[0, -1].double()
            scores.append(float(logits.log_softmax(-1)[int(choice[1:])]))
        right += max(range(3), key=scores.__getitem__) == question["answer"]
    return right / len(QUESTIONS)


def test_a_task_of_ones_own_offline(harness, model, tokenizer):
    result = run_tasks(model, tokenizer, ["awq_words"], folder=harness, max_length=32)
    found = result.metrics["awq_words.acc"]
    assert found.value == accuracy(model)
    assert 0 < found.value < 1 and found.stderr > 0
    assert result.protocol.startswith("lm-eval ")
    first = run_tasks(model, tokenizer, ["awq_words"], folder=harness, limit=1, max_length=32)
    assert first.metrics["awq_words.acc"].value in (0.0, 1.0) and "the first 1 questions" in first.protocol


def test_failures_are_one_line(harness, model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"no task awq_word "):
        run_tasks(model, tokenizer, ["awq_words", "awq_word"], folder=harness)
    with pytest.raises(ConfigError, match="no such folder of tasks"):
        run_tasks(model, tokenizer, ["awq_words"], folder=tmp_path / "none")
    with pytest.raises(AwqError, match="awq_gone: FileNotFoundError") as caught:
        run_tasks(model, tokenizer, ["awq_gone"], folder=harness, max_length=32)
    assert "\n" not in caught.value.message and "HF_HUB_OFFLINE" in caught.value.hint


def test_by_name_within_lm_eval(harness, model, tokenizer, tmp_path):
    """`lm_eval.simple_evaluate(model="awq")` opens the folder itself, with the same result."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import awq_core.integrations.lm_eval  # noqa: F401

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = simple_evaluate(
        model="awq",
        model_args={"pretrained": str(tmp_path / "model"), "device": "cpu", "max_length": 32},
        tasks=["awq_words"],
        task_manager=TaskManager(include_path=str(harness), include_defaults=False),
        log_samples=False,
    )
    expected = run_tasks(model, tokenizer, ["awq_words"], folder=harness, max_length=32)
    assert found["results"]["awq_words"]["acc,none"] == expected.metrics["awq_words.acc"].value


@pytest.mark.parametrize("length", [8, 33, 64])
def test_bits_per_byte_is_lm_evals_rolling_log_likelihood(model, tokenizer, length):
    """Where its tokenizer adds no special tokens to the text, ours and lm-eval's windows are the same."""
    pytest.importorskip("lm_eval")
    import copy
    import math

    from lm_eval.api.instance import Instance

    from awq_core.evaluation import bits_per_byte
    from awq_core.integrations.lm_eval import AwqLM

    text = " ".join(f"w{i * 7 % 39 + 1}" for i in range(33))
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = None
    wrapped = AwqLM(model, tokenizer=plain, max_length=length)
    (theirs,) = wrapped.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ours = bits_per_byte(model, tokenizer, [{"text": text}], window=length)
    assert ours.total.bits * math.log(2) == pytest.approx(-theirs, rel=1e-5)
