"""A small Hugging Face hub on this machine, and the fixtures that send the client to it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml

OWNER = "hf_OwnerOwnerOwner"  # may read and write me/...
READER = "hf_ReaderReaderReader"  # may only read
NOWHERE = "http://127.0.0.1:9"  # nobody listens there


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """What the client asks of huggingface.co, as far as a model is read or written."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict] = {}
        self.uploads: dict[str, bytes] = {}  # what came by LFS, by its sha256
        self.asked: list[str] = []
        self.down = 0  # a status for every answer

    def handle_error(self, *_):
        pass  # a client may close what it keeps open

    def add(self, name: str, files: dict[str, bytes], **about) -> str:
        commit = commit_of(files)
        found = self.repositories.setdefault(
            name, {"private": False, "gated": False, "commits": {}}
        )
        found.update(about)
        found["commits"][commit] = found["commits"]["main"] = files
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, b"", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.down:
            return self.answer(self.server.down)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", OWNER, READER):
            return self.refuse(401, "Invalid credentials in Authorization header")
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, token, body, *match.groups())
        return self.answer(501)

    do_HEAD = do_POST = do_PUT = do_GET

    def readable(self, token, name):
        found = self.server.repositories.get(name)
        if found is None or (found["private"] and not token):
            return self.refuse(404, "RepoNotFound")
        return found

    def info(self, token, _, name, revision):
        if (found := self.readable(token, name)) is None:
            return
        if (files := found["commits"].get(revision or "main")) is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": n, "size": len(c), "blobId": "0"} for n, c in files.items()]
        about = {"id": name, "private": found["private"], "sha": commit_of(files)}
        self.answer(200, {**about, "siblings": siblings})

    def tree(self, token, _, name, revision):
        if (found := self.readable(token, name)) is None:
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": "0"}
            for path, content in found["commits"][revision].items()
        ]
        self.answer(200, entries)

    def file(self, token, _, name, revision, path):
        if (found := self.readable(token, name)) is None:
            return
        if found["gated"] and not token:
            return self.refuse(401, "GatedRepo")
        files = found["commits"][revision]
        content, about = files[path], {"X_Repo_Commit": commit_of(files)}
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if path.endswith(".safetensors"):  # it lies elsewhere
            about |= {"X_Linked_Etag": tag, "X_Linked_Size": len(content)}
            self.server.uploads[tag.strip('"')] = content
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")
            place = f"{elsewhere}/lfs/{tag.strip(chr(34))}"
            return self.answer(302, b"", Location=place, **about)
        self.answer(200, content, ETag=tag, **about)

    def stored(self, token, _body, sha256):
        assert not token  # which is for the hub alone
        self.answer(200, self.server.uploads[sha256])

    def create(self, token, body):
        asked = json.loads(body)
        if token != OWNER or asked["organization"] != "me":
            return self.refuse(403, "Forbidden")
        name = f"me/{asked['name']}"
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.server.add(name, {}, private=bool(is_private))
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def validate(self, _token, body):
        _, front, _ = json.loads(body)["content"].split("---\n", 2)
        faults = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no mapping"}]
        self.answer(200, {"errors": faults, "warnings": []})

    def preupload(self, token, body, _name):
        if token != OWNER:
            return self.refuse(403, "Forbidden")
        files = [file["path"] for file in json.loads(body)["files"]]
        mode = {True: "lfs", False: "regular"}
        self.answer(
            200,
            {
                "files": [
                    {"path": f, "uploadMode": mode[f.endswith("tensors")], "shouldIgnore": False}
                    for f in files
                ]
            },
        )

    def batch(self, _token, body, _name):
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, _token, body, sha256):
        assert hashlib.sha256(body).hexdigest() == sha256
        self.server.uploads[sha256] = body
        self.answer()

    def commit(self, _token, body, name):
        files = dict(self.server.repositories[name]["commits"]["main"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        oid = self.server.add(name, files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.answer(200, {"commitUrl": url, "commitOid": oid})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"GET /api/models/{NAME}(?:/revision/(.+))?", Handler.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.file),
    (r"GET /lfs/(\w+)", Handler.stored),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/preupload/main", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.upload),
    (rf"POST /api/models/{NAME}/commit/main", Handler.commit),
)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Nobody is logged in, the cache is empty; returns what sets huggingface_hub's constants."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def use(endpoint, **values):
        values["ENDPOINT"] = endpoint
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = (
            endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    use(
        NOWHERE,
        HF_HUB_OFFLINE=False,
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_TOKEN_PATH=str(tmp_path / "token"),
        HF_HUB_DISABLE_XET=True,  # another protocol, which needs its own server
    )
    return use


@pytest.fixture
def server(alone):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        alone(server.url)
        yield server
        server.shutdown()
        thread.join()
