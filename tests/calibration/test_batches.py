"""Windows against a stream written out by hand: word "w7" is token 7, every document opens with 0."""

import itertools

import pytest
import torch

from awq_core.calibration.batches import POOL, CalibrationData, multimodal_batches, text_batches
from awq_core.errors import CalibrationError, ConfigError


def words(*numbers):
    return {"text": " ".join(f"w{number}" for number in numbers)}


def windows(data):
    return [row.tolist() for batch in data.batches for row in batch["input_ids"]]


def test_documents_form_one_stream(tokenizer):
    samples = [words(1, 2, 3, 4), words(), words(5), words(6, 7, 8, 9, 10)]
    stream = [0, 1, 2, 3, 4, 0, 5, 0, 6, 7, 8, 9, 10]  # 13 tokens: 4 windows of 3, one left over
    data = text_batches(samples, tokenizer, n_samples=4, seq_len=3, batch_size=3, description="a test")
    assert sorted(windows(data)) == sorted(stream[i : i + 3] for i in (0, 3, 6, 9))
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(3, 3), (1, 3)]
    assert all(set(batch) == {"input_ids"} for batch in data.batches)
    assert data.batches[0]["input_ids"].dtype == torch.int64
    assert (data.source, data.samples, data.tokens, data.notes) == ("a test", 4, 12, ())


def test_long_documents_are_kept_whole_and_raise_no_warning(tokenizer, caplog):
    numbers = range(1, 200)  # longer than the tokenizer's model_max_length
    data = text_batches([words(*numbers)], tokenizer, n_samples=20, seq_len=10, batch_size=20)
    assert sorted(itertools.chain(*windows(data))) == [0, *numbers]
    assert not caplog.records


def test_the_seed_draws_the_windows(tokenizer):
    samples = [words(*range(1 + i, 400 + i)) for i in range(5)]
    stream = list(itertools.chain(*([0, *range(1 + i, 400 + i)] for i in range(5))))
    pool = [stream[i : i + 8] for i in range(0, POOL * 10 * 8, 8)]
    first, again, other = (
        windows(text_batches(samples, tokenizer, n_samples=10, seq_len=8, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other
    for chosen in (first, other):
        assert len({tuple(window) for window in chosen}) == 10
        assert all(window in pool for window in chosen)


def test_reading_stops_after_the_pool(tokenizer):
    read = itertools.count()
    samples = (words(*range(1, 100 + 0 * next(read))) for _ in itertools.repeat(None))  # endless, 100 tokens each
    data = text_batches(samples, tokenizer, n_samples=5, seq_len=20)
    assert data.samples == 5
    assert next(read) == POOL * 5 * 20 // 100


def test_fewer_windows_than_asked_are_used_and_noted(tokenizer):
    data = text_batches([words(*range(1, 35))], tokenizer, n_samples=128, seq_len=10)
    assert (data.samples, data.tokens) == (3, 30)
    assert data.notes == ("3 of the 128 samples asked for: the text holds 35 tokens",)


def test_token_ids_need_no_tokenizer():
    data = text_batches(
        [[1, 2, 3], {"input_ids": [4, 5, 0], "attention_mask": [1, 1, 0]}, torch.tensor([6])], None, seq_len=3
    )
    assert sorted(windows(data)) == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(CalibrationError, match="without its tokenizer"):
        text_batches(["text"], None, seq_len=1)


CHAT = {"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]}


def test_chats_are_rendered_by_the_template(tokenizer):
    tokenizer.chat_template = (
        "<s>{% for m in messages %} {{ '<user>' if m.role == 'user' else '<bot>' }} {{ m.content }}{% endfor %}"
    )
    data = text_batches([CHAT], tokenizer, n_samples=1, seq_len=6)
    assert windows(data) == [[0, 1000, 5, 6, 1001, 7]]  # one <s>: the template's own


def test_chats_without_a_template_are_joined(tokenizer):
    assert windows(text_batches([CHAT], tokenizer, n_samples=1, seq_len=4)) == [[0, 5, 6, 7]]
    parts = [{"type": "image"}, {"type": "text", "text": "w8 w9"}]
    chat = {"messages": [{"role": "user", "content": parts}]}
    assert windows(text_batches([chat], tokenizer, n_samples=1, seq_len=3)) == [[0, 8, 9]]


def test_chats_that_the_template_refuses_are_read_as_text_and_noted(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    data = text_batches([CHAT, CHAT], tokenizer, n_samples=2, seq_len=4)
    assert windows(data) == [[0, 5, 6, 7]] * 2
    assert data.notes == ("2 chats were read as plain text: the chat template refused them (no system role here)",)


def test_images_left_out_are_noted(tokenizer):
    image = type("Image", (), {"convert": None})()
    data = text_batches([{"text": "w1 w2", "images": [image]}], tokenizer, n_samples=1, seq_len=3)
    assert data.notes == ("images left out: 1; only the text was read",)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_less_than_one_window(tokenizer, count):
    samples = [words(*range(1, count))] if count > 1 else [[7]] * count
    with pytest.raises(CalibrationError) as caught:
        text_batches(samples, tokenizer, seq_len=10, description="notes.txt")
    line = str(caught.value)
    assert f"notes.txt holds {count} tokens, one sample needs 10" in line
    assert ("--seq-len of at most" in line) == (count > 0)


@pytest.mark.parametrize("wrong", [50, -1])
def test_token_ids_that_the_model_does_not_have(wrong):
    with pytest.raises(CalibrationError, match=f"sample 1 .* token id {wrong}, but the model has 50 tokens"):
        text_batches([[0, 49], [3, wrong]], None, seq_len=2, vocab_size=50)
    assert text_batches([[0, 49]], None, n_samples=1, seq_len=2, vocab_size=50).samples == 1


@pytest.mark.parametrize("setting", ["n_samples", "seq_len", "batch_size"])
def test_counts_are_positive(tokenizer, setting):
    with pytest.raises(ConfigError, match=f"{setting}=0"):
        text_batches(["w1"], tokenizer, **{setting: 0})


# Images.


def make_batch(sample):
    """Two pixels a picture; a batch of one row, its first token padding."""
    ids = torch.tensor([[0, *range(1, 1 + len(sample["text"]))]])
    pixels = torch.zeros(len(sample["images"]), 2)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels, "extra": None}


def test_one_batch_a_sample_with_its_mask():
    samples = [{"text": "abc"}, {"text": "de"}, {"text": "never read"}]
    data = multimodal_batches(iter(samples), make_batch=make_batch, n_samples=2, description="photos")
    assert isinstance(data, CalibrationData)
    assert [batch["input_ids"].shape[1] for batch in data.batches] == [4, 3]
    assert all(set(batch) == {"input_ids", "attention_mask", "pixel_values"} for batch in data.batches)
    assert (data.source, data.samples, data.tokens, data.notes) == ("photos", 2, 5, ())


def test_fewer_images_are_noted():
    data = multimodal_batches([{"text": "abc"}], make_batch=make_batch, n_samples=2)
    assert data.notes == ("1 of the 2 samples asked for: there are no more",)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "no model inputs came of sample 0 of photos"),
        ({}, "no model inputs"),
        ({"input_ids": [[1, 2]]}, "'input_ids' is list, not a tensor"),
    ],
)
def test_bad_batches_of_a_plugin(batch, message):
    with pytest.raises(CalibrationError, match=message):
        multimodal_batches([{"text": "abc"}], make_batch=lambda sample: batch, description="photos")


def test_no_images():
    with pytest.raises(CalibrationError, match="photos holds no samples"):
        multimodal_batches([], make_batch=make_batch, description="photos")
