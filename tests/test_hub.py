"""The hub's client against a small hub on this machine: its calls, its faults, its cache."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import says
from local_hub import NOWHERE, OWNER, READER, commit_of

from sedd_jax.host import hub

FILES = {
    "config.json": b'{"length": 1024}',
    "model.safetensors": bytes(range(256)) * 5000,
    "sub/vocab.json": "naïve".encode(),
    "empty.txt": b"",
}


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
    with says("cannot get 'me/gated' from the hub", "access on request; ask on its page"):
        get("me/gated")
    with says("cannot get 'me/model@v2' from the hub: no such revision"):
        get("me/model@v2")
    with says("no weights.bin in 'me/model' on the hub, which has config.json, model.safetensors"):
        get("me/model", "weights.bin")
    with says("'a--b/c'", "no name that the hub allows; write owner/name"):
        get("a--b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with says("'me/model'", "the hub refuses (401) the token; set HF_TOKEN to one") as told:
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


def test_an_odd_token_or_cache_is_named_and_a_good_cache_is_enough(
    server, alone, monkeypatch, caplog, tmp_path
):
    server.add("me/model", FILES)
    folder = hub.download("me/model", None, ["config.json"])
    caplog.set_level(logging.INFO, logger="sedd_jax")
    for token in ("hf_odd one", "hf_odd\u00fc"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert hub.download("me/model", None, ["config.json"]) == folder
        with says(
            "'me/other'", "the token has a character that no token has", "unset HF_TOKEN"
        ) as e:
            hub.download("me/other", None, ["config.json"])
        assert "odd" not in str(e.value)
    assert "me/model is taken from the cache: the token has a character" in caplog.messages[0]
    assert "odd" not in caplog.text
    monkeypatch.delenv("HF_TOKEN")
    caplog.clear()
    alone(NOWHERE, HF_HUB_OFFLINE=True)
    assert hub.download("me/model", None, ["config.json"]) == folder
    assert caplog.messages == ["me/model is taken from the cache: HF_HUB_OFFLINE is set"]
    alone(server.url)
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "file/token"))
    with says(
        "cannot get 'me/other' from the hub: NotADirectoryError", "see to the cache's folder"
    ):
        hub.download("me/other", None, ["config.json"])


def test_without_a_network_the_fault_is_told_at_once(alone):
    for is_offline, reason in (
        (False, "no answer (ConnectError"),
        (True, "HF_HUB_OFFLINE is set and the cache does not have it"),
    ):
        alone(NOWHERE, HF_HUB_OFFLINE=is_offline)
        start = time.monotonic()
        with says("cannot get 'me/model' from the hub", reason, "download its files elsewhere"):
            hub.download("me/model", None, ["config.json"])
        with says(f"cannot get 'me/model@{'0' * 40}' from the hub", reason):
            hub.download("me/model", "0" * 40, ["config.json"])
        assert time.monotonic() - start < 6


def test_a_download_that_broke_off_is_not_taken_for_whole_without_a_network(server, alone):
    commit = server.add("me/model", FILES)
    folder = hub.download("me/model", None, ["config.json"], optional=["*.safetensors"])
    (folder / "model.safetensors").unlink()
    alone(NOWHERE)
    for revision in (None, commit):
        with says("from the hub", "no answer (ConnectError", "check the network"):
            hub.download("me/model", revision, ["config.json"], optional=["*.safetensors"])


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
        ({"name": "me/new@main"}, ("'me/new@main' is not the name of a repository",)),
        ({"name": "new"}, ("'new' is not the name of a repository; write owner/name",)),
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
    program = "import sys, sedd_jax.host.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
