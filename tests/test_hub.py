"""The hub's client against a small hub on this machine: its calls, its faults, its cache."""

import base64
import hashlib
import json
import logging
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import says

from sedd_jax.data import hub

OWNER = "hf_OwnerOwnerOwner"  # may read and write me/...
READER = "hf_ReaderReaderReader"  # may only read
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
FILES = {
    "config.json": b'{"length": 1024}',
    "model.safetensors": bytes(range(256)) * 5000,
    "sub/vocab.json": "naïve".encode(),
    "empty.txt": b"",
}


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
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.file),
    (r"GET /lfs/(\w+)", Handler.stored),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{NAME}/preupload/main", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.upload),
    (rf"POST /api/models/{NAME}/commit/main", Handler.commit),
)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Nobody is logged in, and the cache is empty; returns what sets huggingface_hub's constants."""
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


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("louaaron/sedd-small", ("louaaron/sedd-small", None)),
        ("a/b.c@main", ("a/b.c", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        *((name, None) for name in ("", "gpt2", "./b", "/a/b", "a/b/c", "a/b@", "a/../b", "a b/c")),
        ("a/b@x/../../y", None),
    ],
)
def test_a_name_of_the_hub_is_an_owner_a_name_and_perhaps_a_revision(name, found):
    assert hub.parse(name) == found


def test_a_download_is_the_files_asked_for_of_one_commit(server, alone):
    commit = server.add("me/model", FILES)
    for revision in (None, "main", commit):
        folder = hub.download("me/model", revision, ["config.json"], optional=["*.safetensors"])
        assert folder.name == commit
        assert contents(folder) == {n: FILES[n] for n in ("config.json", "model.safetensors")}
    later = server.add("me/model", {**FILES, "config.json": b"{}"})
    assert hub.download("me/model", None, ["config.json"]).name == later
    assert hub.download("me/model", commit, ["sub/vocab.json"]) == folder
    assert contents(folder)["sub/vocab.json"] == FILES["sub/vocab.json"]
    # A commit never changes: what is here of it is not asked for again.
    server.asked.clear()
    assert hub.download("me/model", commit, ["config.json", "sub/vocab.json"]) == folder
    assert not server.asked
    for is_offline in (False, True):
        alone(NOWHERE, HF_HUB_OFFLINE=is_offline)
        assert hub.download("me/model", None, ["config.json"], optional=["x"]).name == later
        assert hub.download("me/model", commit, ["config.json"], optional=["x"]) == folder
    assert not server.asked


def test_every_fault_of_a_download_is_named(server, alone, monkeypatch):
    commit = server.add("me/model", FILES)
    server.add("me/gated", FILES, gated=True)
    server.add("me/private", FILES, private=True)

    def get(name, file="config.json"):
        return hub.download(*hub.parse(name), [file])

    with says("cannot get 'me/modell' from the hub: no such repository", "check the spelling"):
        get("me/modell")
    with says("'me/private'", "or a private one", "run `hf auth login`"):
        get("me/private")
    with says("cannot get config.json of 'me/gated'", "access on request; ask on its page"):
        get("me/gated")
    with says("cannot get 'me/model@v2' from the hub: no such revision"):
        get("me/model@v2")
    with says("no weights.bin in 'me/model' on the hub, which has config.json, model.safetensors"):
        get("me/model", "weights.bin")
    with says("'a--b/c'", "no name that the hub allows; write owner/name"):
        get("a--b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with says("'me/model'", "the hub refuses (401); run `hf auth login`") as told:
        get("me/model")
    assert "hf_expired" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert get("me/private").name == get("me/gated").name == commit
    server.down = 503
    with says("'me/model'", "the hub answers 503", "try again later, or download its files"):
        get("me/model")
    assert get("me/private").name == commit  # from the cache
    # Started with a network that then went.
    server.down = 0
    place = get("me/model") / "config.json"
    place.resolve().write_bytes(b"half")
    with says("has 4 bytes, on the hub it has 16; delete", "and run again"):
        get("me/model")
    # What is gone from the hub is told, though the cache has what it once was.
    del server.repositories["me/model"]["commits"]["main"]
    with says("'me/model' from the hub: no such revision"):
        get("me/model")


def test_without_a_network_the_fault_is_told_at_once(alone):
    for is_offline, reason in (
        (False, "no answer (ConnectError"),
        (True, "HF_HUB_OFFLINE is set and the cache does not have it"),
    ):
        alone(NOWHERE, HF_HUB_OFFLINE=is_offline)
        start = time.monotonic()
        with says("cannot get 'me/model' from the hub", reason, "download its files elsewhere"):
            hub.download("me/model", None, ["config.json"])
        assert time.monotonic() - start < 3


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "folder"
    for name, content in {**FILES, ".git/HEAD": b"not for the hub"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def put(folder, name="me/new", *, private=False, token=OWNER):
    return hub.push(folder, name, private=private, token=token, message="A model")


@pytest.mark.parametrize("private", [False, True])
def test_a_push_is_one_commit_of_the_bytes_of_the_folder(server, folder, private, monkeypatch):
    url = put(folder, private=private)
    made = server.repositories["me/new"]
    assert made["private"] == private and made["commits"]["main"] == FILES
    assert url == f"{server.url}/me/new/commit/{commit_of(FILES)}"
    assert len([line for line in server.asked if "/commit/" in line]) == 1
    monkeypatch.setenv("HF_TOKEN", OWNER)  # and the same without naming the token
    (folder / "config.json").write_bytes(b"{}")
    url = put(folder, private=private, token=None)
    got = hub.download("me/new", None, ["config.json"], optional=["*"])
    assert url.endswith(got.name) and contents(got) == {**FILES, "config.json": b"{}"}


def test_every_fault_of_a_push_is_named_without_the_token(
    server, folder, tmp_path, alone, caplog, capfd
):
    caplog.set_level(logging.DEBUG)
    server.add("me/public", {})
    told = []
    for options, parts in (
        ({"name": "me/new@main"}, ("'me/new@main' is no name of a repository",)),
        ({"name": "new"}, ("'new' is no name of a repository; write owner/name",)),
        ({"folder": tmp_path}, ("no config.json in",)),
        ({"token": None}, ("no token to write to 'me/new'; run `hf auth login`",)),
        ({"token": f"{OWNER}\n"}, ("has a character that no token has",)),
        ({"token": READER}, ("to 'me/new': the hub refuses (403); use a token with the right",)),
        ({"token": READER, "name": "me/public"}, ("'me/public': the hub refuses (403)",)),
        ({"token": "hf_expired"}, ("the hub refuses (401)",)),
        ({"name": "you/new"}, ("to 'you/new': the hub refuses (403)",)),
        ({"name": "me/public", "private": True}, ("'me/public' is public already",)),
    ):
        with says(*parts) as error:
            put(**{"folder": folder, **options})
        told.append(error.getrepr(style="native"))
    alone(NOWHERE)
    with says("cannot push", "to 'me/new': no answer (ConnectError", "check the network") as error:
        put(folder)
    told.append(error.getrepr(style="native"))
    assert server.repositories.keys() == {"me/public"}
    assert server.repositories["me/public"]["commits"]["main"] == {}
    everything = "".join([caplog.text, *capfd.readouterr(), *map(str, told)])
    for token in (OWNER, READER, "hf_expired"):
        assert token not in everything


def test_the_client_is_imported_by_its_first_use():
    program = "import sys, sedd_jax.data.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
