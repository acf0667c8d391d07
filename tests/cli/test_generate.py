"""`awq generate`: the model's own greedy text, a chat template where there is one, pictures for models that see."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import awq_core
from awq_core.cli.generate import Stopwatch

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def greedy(folder, prompt, count):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = awq_core.load(folder).generate(**ids, do_sample=False, max_new_tokens=count)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_text_and_speed(awq, quantized):
    result = awq("generate", quantized, "--prompt", "def add(", "--max-new-tokens", 12)
    assert result.stdout == greedy(quantized, "def add(", 12) + "\n"
    line = result.errors[-1]
    assert line.startswith("12 tokens, ") and "tokens per second, first after" in line and line.endswith("on cpu")


def test_fused(awq, quantized):
    result = awq("generate", quantized, "--prompt", "def add(", "--max-new-tokens", 12, "--fuse")
    assert result.stdout == greedy(quantized, "def add(", 12) + "\n"
    assert "not fused: the plugin declares no fused blocks" in result.errors


def test_json(awq, read_json, llama_source):
    data = read_json(awq("generate", llama_source, "--prompt", "x = ", "--max-new-tokens", 5, "--json"))
    assert data["text"] == greedy(llama_source, "x = ", 5)
    assert (data["prompt_tokens"], data["new_tokens"], data["chat_template"]) == (4, 5, False)
    assert data["tokens_per_second"] > 0


def test_one_token_has_no_speed(awq, read_json, llama_source):
    data = read_json(awq("generate", llama_source, "--prompt", "x", "--max-new-tokens", 1, "--json"))
    assert data["tokens_per_second"] is None


def test_sampling_is_drawn_from_the_seed(awq, read_json, llama_source):
    def text(*options):
        arguments = ["generate", llama_source, "--prompt", "x", "--max-new-tokens", 12, "--temperature", 2, "--json"]
        return read_json(awq(*arguments, *options))["text"]

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)


def test_chat_template_and_raw(awq, read_json, llama_source, tmp_path):
    folder = shutil.copytree(llama_source, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    arguments = ["generate", folder, "--prompt", "hi", "--max-new-tokens", 6, "--json"]
    chat, raw = read_json(awq(*arguments)), read_json(awq(*arguments, "--raw"))
    assert (chat["chat_template"], chat["prompt_tokens"]) == (True, len("<user>hi>"))
    assert chat["text"] == greedy(folder, "<user>hi>", 6)
    assert (raw["chat_template"], raw["prompt_tokens"]) == (False, 2)
    assert raw["text"] == greedy(folder, "hi", 6)


def test_a_sampling_model_is_greedy_at_temperature_zero(awq, read_json, llama_source, tmp_path):
    folder = shutil.copytree(llama_source, tmp_path / "hot")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 9.0, "top_p": 0.9}))
    data = read_json(awq("generate", folder, "--prompt", "x = ", "--max-new-tokens", 8, "--json"))
    assert data["text"] == greedy(llama_source, "x = ", 8)


def test_picture(awq, read_json, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    from awq_core.testing import save_tiny
    from awq_core.testing.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    text = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    token = tokenizer.convert_tokens_to_ids("<image>")
    save_tiny(LlavaConfig(vision_config=vision, text_config=text, image_token_index=token), tmp_path / "seeing")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path / "seeing")

    def text_for(color):
        image.new("RGB", (40, 30), color).save(tmp_path / "photo.png")
        arguments = ["--prompt", "what", "--image", tmp_path / "photo.png", "--max-new-tokens", 8, "--json"]
        return read_json(awq("generate", tmp_path / "seeing", *arguments))

    red = text_for((255, 0, 0))
    assert red["prompt_tokens"] == 4 + len("\nwhat") and red["new_tokens"] == 8  # four patches
    assert red["text"] != text_for((0, 0, 255))["text"]


def test_failures(awq, llama_source, tmp_path):
    prompt = ["--prompt", "x"]
    assert "takes no images" in awq("generate", llama_source, *prompt, "--image", __file__, code=1).errors[-1]
    assert "the prompt is empty" in awq("generate", llama_source, "--prompt", "", code=2).errors[-1]
    assert "no such model folder" in awq("generate", tmp_path / "none", *prompt, code=1).errors[-1]
    assert "'abacus' is not known" in awq("generate", llama_source, *prompt, "--device", "abacus", code=2).errors[-1]
    assert "does not exist" in awq("generate", llama_source, *prompt, "--image", tmp_path / "no.png", code=2).stderr
    folder = shutil.copytree(llama_source, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer could be opened" in awq("generate", folder, *prompt, code=1).errors[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(awq, llama_source):
    assert "sees no GPU" in awq("generate", llama_source, "--prompt", "x", "--device", "cuda", code=2).errors[-1]


def test_stopwatch_counts_tokens_not_calls():
    watch = Stopwatch()
    watch.put(torch.zeros(1, 9))
    watch.put(torch.zeros(1))
    watch.put(torch.zeros(3))
    watch.end()
    watch.times = [0.0, 0.5, 1.5]
    assert (watch.first, watch.speed) == (0.5, 3.0)
