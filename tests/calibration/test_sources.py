"""Every kind of source yields the documents that were written; every bad one is one clear line."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image

from awq_core.calibration import sources
from awq_core.calibration.formats import PIECE
from awq_core.calibration.sources import STANDARD_LIBRARY, describe_source, read_samples, read_text, standard_library
from awq_core.errors import CalibrationError

ROWS = [{"text": "first"}, {"text": "zweites: ü"}, {"text": ""}, {"text": "last"}]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def failure(*args, **kwargs):
    """The one line that reading a source to its end fails with."""
    with pytest.raises(CalibrationError) as caught:
        list(read_samples(*args, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), color).save(path)


def test_reading_samples_needs_no_torch():
    code = (
        "import sys; from awq_core.calibration import read_samples; next(read_samples()); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# Files.


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffone\r\ntwo ü\n".encode())
    assert list(read_samples(path)) == [{"text": "one\ntwo ü\n"}]
    assert list(read_samples(str(path))) == list(read_samples(path))


def test_large_text_file_comes_in_pieces_that_add_up(tmp_path):
    text = "".join(f"line {i} äöü€\n" for i in range(150_000))
    path = tmp_path / "large.txt"
    path.write_text(text, encoding="utf-8")
    pieces = [sample["text"] for sample in read_samples(path)]
    assert len(pieces) == -(-len(text) // PIECE) > 1
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert read_text(path) == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.zst", "a.parquet"])
def test_data_files_yield_their_rows(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, **row} for row in ROWS]), path)
    elif name.endswith(".zst"):
        # Two frames, as parallel writers leave them, split inside a line.
        data, compress = jsonl(ROWS).encode(), zstandard.ZstdCompressor().compress
        path.write_bytes(compress(data[:30]) + compress(data[30:]))
    else:
        path.write_text(jsonl(ROWS[:2]) + "\n" + jsonl(ROWS[2:]))
    assert list(read_samples(path)) == ROWS
    assert read_text(path) == "first\n\nzweites: ü\n\n\n\nlast"


def test_compressed_text(tmp_path):
    path = tmp_path / "book.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress("chapter ü\n".encode()))
    assert list(read_samples(path)) == [{"text": "chapter ü\n"}]


def test_a_file_is_read_no_further_than_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([{"text": "good"}]) + "broken\n")
    assert next(read_samples(path)) == {"text": "good"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"content": "c"}, {"text": "c"}),
        ({"text": None, "id": 3}, {"text": ""}),
        ({"prompt": "2+2=", "completion": "4"}, {"text": "2+2=4"}),
        ({"prompt": "2+2=", "completion": None}, {"text": "2+2="}),
        (
            {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        ),
        (
            {"messages": [{"role": "user", "content": "hi", "tool_calls": None}]},
            {"messages": [{"role": "user", "content": "hi"}]},
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        ),
        ({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [5, 6]}),
    ],
)
def test_columns(tmp_path, row, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([{"text": "other"}, row]))
    assert list(read_samples(path))[-1] == expected


def test_text_column_names_any_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([{"text": "no", "body": "yes"}]))
    assert list(read_samples(path, text_column="body")) == [{"text": "yes"}]
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "no", "body": "yes"}]), table)
    assert list(read_samples(table, text_column="body")) == [{"text": "yes"}]


def test_parquet_images_are_decoded(tmp_path):
    picture(tmp_path / "red.png", (255, 0, 0))
    row = {"text": "red", "image": {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (sample,) = read_samples(tmp_path / "a.parquet")
    assert sample["text"] == "red"
    assert [image.getpixel((0, 0)) for image in sample["images"]] == [(255, 0, 0)]


# Folders.


def test_folder_of_texts(tmp_path):
    files = {"b.md": "B", "a.txt": "A", "sub/c.py": "C", ".hidden.txt": "no", ".git/x.txt": "no", "sub/d.jsonl": None}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(jsonl([{"text": "D1"}, {"text": "D2"}]) if text is None else text)
    (tmp_path / "model.bin").write_bytes(b"\x00\x01\xff")
    picture(tmp_path / "plot.png", (0, 0, 0))
    assert [sample["text"] for sample in read_samples(tmp_path)] == ["A", "B", "C", "D1", "D2"]
    assert read_text(tmp_path) == "A\n\nB\n\nC\n\nD1\n\nD2"


def test_folder_order_is_drawn_from_the_seed(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    orders = [[sample["text"] for sample in read_samples(tmp_path, shuffle=True, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(map(int, orders[0])) == list(range(20))
    assert [int(sample["text"]) for sample in read_samples(tmp_path, seed=1)] == list(range(20))


def test_image_folder_with_metadata(tmp_path):
    picture(tmp_path / "red.png", (255, 0, 0))
    picture(tmp_path / "sub" / "blue.png", (0, 0, 255))
    rows = [{"file_name": "sub/blue.png", "text": "blue"}, {"file_name": "red.png", "text": "red"}]
    (tmp_path / "metadata.jsonl").write_text(jsonl(rows))
    samples = list(read_samples(tmp_path))
    assert [sample["text"] for sample in samples] == ["blue", "red"]
    assert [sample["images"][0].getpixel((1, 1)) for sample in samples] == [(0, 0, 255), (255, 0, 0)]


def test_image_folder_with_captions_beside(tmp_path):
    for name, color in (("b.png", (0, 0, 255)), ("a.png", (255, 0, 0))):
        picture(tmp_path / name, color)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    samples = list(read_samples(tmp_path))
    assert [sample["text"] for sample in samples] == ["caption of a.png", "caption of b.png"]
    assert samples[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert samples[0]["images"][0].mode == "RGB"


# What is given in memory, and the default.


def test_given_data():
    ids = [[1, 2, 3], [4]]
    assert list(read_samples(ids)) == [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    chat = [{"role": "user", "content": "hi"}]
    given = ["a", {"text": "b", "id": 1}, {"messages": chat}, chat]
    assert list(read_samples(given)) == [{"text": "a"}, {"text": "b"}, {"messages": chat}, {"messages": chat}]
    assert next(read_samples(f"text {i}" for i in iter(int, 1))) == {"text": "text 0"}


def test_default_is_the_standard_library():
    samples = list(read_samples())
    assert samples == list(standard_library())
    assert len(samples) > 50
    assert any("class TextWrapper" in sample["text"] for sample in samples)
    rest = list(standard_library(exclude=["textwrap", "queue.py"]))
    assert [sample for sample in samples if sample in rest] == rest
    assert len(rest) == len(samples) - 2
    assert not any("class TextWrapper" in sample["text"] for sample in rest)


def test_descriptions(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    assert describe_source(None) == STANDARD_LIBRARY
    assert describe_source(tmp_path / "mine.jsonl") == "mine.jsonl"
    assert describe_source(str(tmp_path)) == tmp_path.name
    assert describe_source("pileval") == "Hugging Face dataset mit-han-lab/pile-val-backup"
    assert describe_source(["a"]) == "samples given by the caller"


# The hub.


class Stream:
    """Stands for `datasets.IterableDataset`."""

    def __init__(self, rows, calls):
        self.rows, self.calls = rows, calls

    def __iter__(self):
        return iter(self.rows)

    def shuffle(self, **kwargs):
        self.calls.append(kwargs)
        return self


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if "missing" in name:
            raise ConnectionError("Couldn't reach it\nsecond line")
        splits = {"validation": Stream([{"text": "val"}], calls)}
        if "pile" not in name:
            splits["train"] = Stream([{"text": "train"}], calls)
        return splits if split is None else splits[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return calls


def test_hub_datasets_are_streamed(hub):
    assert list(read_samples("org/name:en")) == [{"text": "train"}]
    assert list(read_samples("wikitext", split="validation")) == [{"text": "val"}]
    assert list(read_samples("pileval", shuffle=True, seed=7)) == [{"text": "val"}]
    assert hub == [
        ("org/name", "en", None, True),
        ("wikitext", None, "validation", True),
        ("mit-han-lab/pile-val-backup", None, None, True),
        {"seed": 7, "buffer_size": sources.SHUFFLE_BUFFER},
    ]


def test_hub_out_of_reach(hub, monkeypatch):
    line = failure("org/missing")
    assert "'org/missing'" in line and "Couldn't reach it" in line and "second line" not in line
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in failure("org/missing")


def test_hub_split_that_is_not_there(hub):
    assert "pileval" in failure("pileval", split="train")


def test_local_sources_never_ask_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").write_text("a file of that name")
    assert list(read_samples("wikitext")) == [{"text": "a file of that name"}]
    assert hub == []


# Bad input.


@pytest.mark.parametrize(
    "name", ["gone.txt", "./gone", "/no/such/folder", "a/b/c", "", "two words", "x" * 5000 + "/y/"]
)
def test_not_found_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match="no such file or folder of text"):
        read_samples(name)


def test_path_objects_are_never_datasets(tmp_path):
    with pytest.raises(CalibrationError, match="no such"):
        read_samples(tmp_path / "corpus")


@pytest.mark.parametrize("source", [{"train": ["a"]}, 3])
def test_no_source_at_all(source):
    assert "no calibration source" in failure(source)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "folder"])
def test_empty(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "blank.txt").write_text(" \n")
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    else:
        path.write_text("")
    line = failure(path)
    assert str(path) in line and "holds no text" in line
    assert "holds no text" in failure([])


@pytest.mark.parametrize(
    ("name", "data", "byte"),
    [
        ("latin.txt", b"ascii line\ncaf\xe9\n", 14),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 24),
        ("cut.txt", "ab€".encode()[:-1], 2),
        ("utf16.txt", "hello".encode("utf-16"), 0),
        ("late.txt", b"x" * (PIECE + 3) + b"\n" + b"y" * PIECE + b"\xe9", 2 * PIECE + 4),
    ],
)
def test_not_utf8_names_the_byte(tmp_path, name, data, byte):
    path = tmp_path / name
    path.write_bytes(data)
    assert failure(path).startswith(f"{path} is not UTF-8: byte {byte} (")


def test_not_utf8_in_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xe9")
    assert f"{tmp_path / 'b.txt'} is not UTF-8: byte 0" in failure(tmp_path)


@pytest.mark.parametrize("bad", ['{"text": "a"', "[1]", '"text"', "{'text': 'a'}"])
def test_bad_json_names_the_line(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(ROWS[:2]) + "\n" + bad + "\n")
    assert f"{path} line 4 is not" in failure(path)


def test_deeply_nested_json_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 200_000 + "\n")
    assert str(path) in failure(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": 1, "body": "x"}, ["line 1 has no text column", "id, body", "messages"]),
        ({"prompt": "p"}, ["no text column", "prompt"]),
        ({"text": 3}, ["line 1, column 'text', is int"]),
        ({"messages": [{"content": "hi"}]}, ["column 'messages', has a message without a role"]),
        ({"prompt": "p", "completion": [{"role": "user", "content": "c"}]}, ["not both text"]),
    ],
)
def test_rows_without_text(tmp_path, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([row]))
    line = failure(path)
    assert all(word in line for word in words), line


def test_missing_text_column_lists_the_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, "image": "x"}]), path)
    assert "no text column; its columns: id, image" in failure(path)
    assert "no column 'body'; its columns: id, image" in failure(path, text_column="body")


def test_damaged_files(tmp_path):
    parquet, fake = tmp_path / "a.parquet", tmp_path / "fake.jsonl.zst"
    parquet.write_bytes(b"PAR1 nothing")
    fake.write_text("not compressed")
    for path in (parquet, fake):
        assert failure(path).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("rows", [10, 100_000])
def test_compressed_file_that_is_cut_short(tmp_path, rows):
    path = tmp_path / "cut.jsonl.zst"
    data = jsonl([{"text": f"{i * 7919} {i}"} for i in range(rows)]).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(data))
    assert len(list(read_samples(path))) == rows
    path.write_bytes(path.read_bytes()[:-5])
    assert "the file is cut short" in failure(path)


def test_missing_zstandard_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install awq-core[zstd]" in failure(tmp_path / "a.jsonl.zst")


def test_missing_pillow_says_what_to_install(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", (0, 0, 0))
    (tmp_path / "a.txt").write_text("black")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install awq-core[vision]" in failure(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png"])
def test_image_names_stay_inside_the_folder(tmp_path, name):
    picture(tmp_path / "secret.png", (0, 0, 0))
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(jsonl([{"file_name": name, "text": "x"}]))
    line = failure(folder)
    assert "leaves the folder" in line and "line 1" in line


def test_bad_image_folders(tmp_path):
    picture(tmp_path / "none" / "a.png", (0, 0, 0))
    assert "images without captions" in failure(tmp_path / "none")
    picture(tmp_path / "half" / "a.png", (0, 0, 0))
    picture(tmp_path / "half" / "b.png", (0, 0, 0))
    (tmp_path / "half" / "a.txt").write_text("a")
    assert "b.png has no caption" in failure(tmp_path / "half")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "metadata.jsonl").write_text(jsonl([{"file_name": "x.png", "text": "x"}, {"text": "y"}]))
    assert "no such image" in failure(tmp_path / "gone")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "a.png").write_text("no picture")
    (tmp_path / "fake" / "a.txt").write_text("a")
    assert "a.png is not a readable image" in failure(tmp_path / "fake")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "metadata.jsonl").write_bytes(b'{"file_name": "\xe9.png"}')
    assert "metadata.jsonl is not UTF-8: byte 15" in failure(tmp_path / "latin")
    picture(tmp_path / "nameless" / "a.png", (0, 0, 0))
    rows = [{"file_name": "a.png", "text": "x"}, {"text": "y"}]
    (tmp_path / "nameless" / "metadata.jsonl").write_text(jsonl(rows))
    assert "line 2 has no file_name" in failure(tmp_path / "nameless")
