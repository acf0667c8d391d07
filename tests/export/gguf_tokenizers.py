"""Tokenizers of the kinds that llama.cpp has, made from the demo model's and this repository's text."""

import json

from .gguf_models import ROOT

TEXTS = ("def read_json(path):\n", "import os\nclass  Foo:\n    '''x's   12345 é 日本 '''\n\n\n\treturn", " ", "WE'RE")


def bytes_after(*patterns, normalizer=None, **model):
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not patterns})
    return {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": model}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


PIECES = (
    "I'd say: \"it's 1234567 of 89,012.5%\"!\n\n\n  x\t=\ty ;;\r\n",
    "日本語のテキスト123、漢字とカナ。",
    "raise ValueError or NotImplementedError, HTTPServer Ünïcode e\u0301a",
    "  trailing   \n ",
    "\U0001f600\U0001f600 a_b__c -->//comment\n/path/to",
    "नमस्ते Привет שלום 한국어",
    "we'LL I'M 'tis",
)


def splitting(steps):
    """The demo model's merges behind a way to split text, as tokenizer.json."""
    patterns = [step for step in steps if step not in ("bytes", "digits")]
    made = bytes_after(*patterns)["pre_tokenizer"]
    if "digits" in steps:
        made["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    data = json.loads((ROOT / "examples" / "pycoder" / "tokenizer.json").read_text())
    return json.dumps({**data, "pre_tokenizer": made})


def sentencepiece_like(folder):
    """A tokenizer with byte fallback and every merge, as transformers makes it of sentencepiece's BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = (ROOT / "README.md").read_text().splitlines()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=first, show_progress=False))
    vocab = trained.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = "\u2581"
    made.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in first[:3]])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokens.save_pretrained(folder)
    return tokens
