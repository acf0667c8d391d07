"""`awq push`: what would leave, what must not, and a push to a stand-in for the hub that breaks off and goes on."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

import awq_core
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.cli import push

# By its path: test files are imported one by one, each as if it were alone.
_spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
fake_hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_hub)


@pytest.fixture(scope="module")
def made(llama_source, corpus, tmp_path_factory):
    """A quantized folder with its scales beside it: two files of weights. Never change it."""
    out = tmp_path_factory.mktemp("push") / "quantized"
    config = awq_core.QuantConfig(group_size=32)
    awq_core.quantize(llama_source, out, config=config, calibration=list(corpus), samples=4, seq_len=32)
    return out


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "quantized"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of our own, and no other: its address, no xet, no wait between attempts, nobody's login."""
    one = fake_hub.FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", one.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", one.token)
    yield one
    one.close()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_lists_everything_and_sends_nothing(awq, read_json, hub, folder):
    data = read_json(awq("push", folder, "org/name", "--dry-run", "--json"))
    sizes = {name: len(content) for name, content in contents(folder).items()}
    assert {one["name"]: one["bytes"] for one in data["files"]} == sizes
    assert data["bytes"] == sum(sizes.values())
    assert {"README.md", "recipe.yaml", "config.json", "model.safetensors", "calibration/scales.safetensors"} <= set(
        sizes
    )
    shown = awq("push", folder, "org/name", "--dry-run")
    assert [line.split()[-1] for line in shown.stdout.splitlines()] == sorted(sizes)
    assert f"{len(sizes)} files" in shown.errors[-1] and "would be sent to org/name" in shown.errors[-1]
    assert hub.repos == {} and hub.puts == []


def test_everything_arrives_byte_for_byte(awq, read_json, hub, folder):
    data = read_json(awq("push", folder, "org/name", "--json"))
    assert hub.repos["org/name"] == {"private": False, "branches": {"main": contents(folder)}}
    assert data["url"].startswith(f"{hub.url}/org/name/commit/") and hub.commits == 1


def test_a_private_branch_with_a_token_of_another_name(awq, hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("MINE", hub.token)
    result = awq("push", folder, "org/name", "--private", "--revision", "v/2", "--token-env", "MINE")
    repo = hub.repos["org/name"]
    assert repo["private"] and repo["branches"] == {"main": {}, "v/2": contents(folder)}
    assert hub.token not in result.output


def test_it_goes_on_after_a_broken_connection(awq, hub, folder):
    hub.cut = 1  # the first object arrives, every other breaks off, however often it is tried
    result = awq("push", folder, "org/name", code=1)
    assert result.errors[-1].startswith("awq: error: org/name: ") and "run the same command again" in result.errors[-1]
    assert len(hub.objects) == 1 and hub.repos["org/name"]["branches"]["main"] == {} and hub.commits == 0
    (arrived,) = hub.objects
    hub.cut = None
    awq("push", folder, "org/name")
    assert hub.repos["org/name"]["branches"]["main"] == contents(folder)
    assert hub.puts.count(arrived) == 1, "what had arrived was sent twice"


def test_one_broken_connection_is_tried_again_at_once(awq, hub, folder, monkeypatch):
    hub.cut = 0
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: setattr(hub, "cut", None))
    awq("push", folder, "org/name")
    assert hub.repos["org/name"]["branches"]["main"] == contents(folder)


def test_a_second_push_sends_what_changed(awq, hub, folder):
    awq("push", folder, "org/name")
    (folder / "README.md").write_text("---\ntags: [awq]\n---\nNew.\n")
    before = list(hub.puts)
    awq("push", folder, "org/name")
    assert hub.puts == before
    assert hub.repos["org/name"]["branches"]["main"] == contents(folder)


def test_private_is_not_pushed_to_a_public_repository(awq, hub, folder):
    hub.repos["org/name"] = {"private": False, "branches": {"main": {}}}
    line = awq("push", folder, "org/name", "--private", code=2).errors[-1]
    assert "there already and public" in line
    assert hub.puts == [] and hub.repos["org/name"]["branches"]["main"] == {}


def test_a_wrong_token_is_one_line(awq, hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = awq("push", folder, "org/name", code=1)
    (line,) = result.errors
    assert "401" in line and "--token-env" in line and "hf_wrong" not in result.output
    assert "no NOT_THERE" in awq("push", folder, "org/name", "--token-env", "NOT_THERE", code=2).errors[-1]


def test_no_hub_is_one_line(awq, hub, folder):
    hub.close()
    (line,) = awq("push", folder, "org/name", code=1).errors
    assert line.startswith("awq: error: org/name: ")


@pytest.mark.parametrize(
    "name",
    [
        ".awq-partial/journal.jsonl",
        "pytorch_model.bin",
        "statistics.pt",
        "model.safetensors.tmp",
        ".env",
        "calibration/.hidden.json",
        "notes.md~",
        "id_rsa",
        "modeling.py",
        "log",
    ],
)
def test_what_must_not_leave_stops_the_command(awq, hub, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    for options in (("--dry-run",), ()):
        (line,) = awq("push", folder, "org/name", *options, code=2).errors
        assert (".awq-partial" if "partial" in name else name) in line
    assert hub.repos == {}


def test_links_that_lead_out_do_not_leave(awq, hub, folder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "linked.json").symlink_to(tmp_path / "secret.json")
    assert "linked.json" in awq("push", folder, "org/name", "--dry-run", code=2).errors[-1]
    (folder / "linked.json").unlink()
    (folder / "linked").symlink_to(tmp_path)
    assert "linked" in awq("push", folder, "org/name", "--dry-run", code=2).errors[-1]


def test_a_models_own_code_leaves_with_it(folder):
    (folder / "modeling.py").write_text("")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "modeling.C"}}))
    assert "modeling.py" in push.files_to_send(folder)


def test_caches_of_git_and_the_hub_are_left(folder):
    for name in (".git/config", ".cache/huggingface/download/x.lock"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    assert push.files_to_send(folder).keys() == contents(folder).keys() - {
        ".git/config",
        ".cache/huggingface/download/x.lock",
    }


def test_what_is_no_quantized_folder(awq, folder, llama_source, tmp_path):
    assert "no config.json there" in awq("push", tmp_path, "org/name", "--dry-run", code=1).errors[-1]
    assert "not quantized" in awq("push", llama_source, "org/name", "--dry-run", code=1).errors[-1]
    assert "bad name" in awq("push", folder, "bad name", "--dry-run", code=2).errors[-1]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(awq_core.AwqError):
        CheckpointReader(folder)
    awq("push", folder, "org/name", "--dry-run", code=1)
