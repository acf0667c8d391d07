"""A stand-in for the Hugging Face hub, on loopback: repositories, branches, LFS objects, commits; it can break off.

Only what huggingface_hub calls for an upload without xet. Objects are checked against their SHA-256 when they arrive,
and a commit is refused where one of its objects has not.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub:
    """`repos`: name -> {"private": bool, "branches": {name: {path: bytes}}}. `puts`: names of objects, as they began to
    arrive. `cut`: how many objects may still arrive whole; the connection of any further one is dropped halfway."""

    def __init__(self, token="hf_secret"):
        self.token = token
        self.repos = {}
        self.objects = {}
        self.puts = []
        self.commits = 0
        self.cut = None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        name = urlsplit(self.path).path.removeprefix("/api/models/").partition("/revision/")[0]
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.answer({"error": "not found"}, 404)
        return self.answer({"id": name, "private": repo["private"], "sha": f"{self.hub.commits:040d}", "siblings": []})

    def do_POST(self):
        path, raw = urlsplit(self.path).path, self.body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(raw))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(raw))
        name, action, branch = path.removeprefix("/api/models/").rsplit("/", 2)
        branches, branch = self.hub.repos[name]["branches"], unquote(branch)
        if action == "branch":
            known = branch in branches
            branches.setdefault(branch, dict(branches["main"]))
            return self.answer({}, 409 if known else 200)
        if action == "preupload":
            return self.answer(
                {"files": [self.mode(file["path"], branches[branch]) for file in json.loads(raw)["files"]]}
            )
        assert action == "commit", path
        return self.commit(name, branches[branch], [json.loads(line) for line in raw.splitlines()])

    def create(self, wanted):
        name = "/".join(filter(None, (wanted.get("organization") or "me", wanted["name"])))
        known = name in self.hub.repos
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repos.setdefault(name, {"private": private, "branches": {"main": {}}})
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    @staticmethod
    def mode(path, files):
        oid = hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest() if path in files else None
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid if mode == "regular" else None}

    def batch(self, wanted):
        objects = []
        for one in wanted["objects"]:
            known = one["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            objects.append({**one, **({} if known else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def do_PUT(self):
        oid = self.path.rpartition("/")[2]
        with self.hub.lock:
            self.hub.puts.append(oid)
            broken = self.hub.cut is not None and self.hub.cut <= 0
            if self.hub.cut is not None:
                self.hub.cut -= 1
        if broken:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        data = self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def commit(self, name, files, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer({"error": f"no object {value['oid']}"}, 400)
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits += 1
        oid = f"{self.hub.commits:040d}"
        return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})
