"""The Hugging Face hub: what is named owner/name@revision.

huggingface_hub is imported by the calls that need it; its cache, HF_HOME, HF_HUB_OFFLINE and
HF_TOKEN mean here what they mean there.
"""

import contextlib
import fnmatch
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds that the hub has to connect and to answer
COMMIT = re.compile(r"[0-9a-f]{40}")
_HTTP = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # below huggingface_hub
_NAME = re.compile(r"(?!.*\.\.)(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


def parse(name: str) -> tuple[str, str | None] | None:
    """Returns owner/name and the revision of "owner/name[@revision]"; None for any other string."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def download(
    repository: str, revision: str | None, files: Sequence[str], *, optional: Sequence[str] = ()
) -> Path:
    """Returns the folder that holds `files` of a repository; its name is the commit.

    revision: a commit, branch or tag; None is main. `optional` files come where they exist; their
    names may be patterns. What the cache has is not got again. Where the hub does not answer, the
    cache is enough if it has `files`: they come last, so that with them a download was whole.

    ValueError of one line: no such repository, revision or file; no right to read it; no network
    and not in the cache; a download that broke off, or a file of the cache that is not whole.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    name = repository if revision is None else f"{repository}@{revision}"
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        folder = _cached(repository, revision, [*optional, *files])
        if folder is not None:
            return folder
    try:
        info = HfApi().model_info(
            repository, revision=revision, timeout=TIMEOUT, files_metadata=True
        )
    except Exception as error:  # the hub's own errors, its HTTP library's and the system's
        folder = _cached(repository, revision, files)
        # That a revision is gone is news, not a fault of the network.
        if folder is not None and not isinstance(error, RevisionNotFoundError):
            log.info("%s from the cache: %s", name, _reason(error).split(";")[0])
            return folder
        raise ValueError(f"cannot get {name!r} from the hub: {_reason(error)}") from error

    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for file in files:
        if file not in sizes:
            raise ValueError(
                f"no {file} in {name!r} on the hub, which has {_short(', '.join(sizes)) or 'none'};"
                " give the name of a repository that has it"
            )
    more = {file for file in sizes for p in optional if fnmatch.fnmatchcase(file, p)}
    for file in (*sorted(more.difference(files)), *files):
        try:
            place = Path(hf_hub_download(repository, file, revision=info.sha))
        except Exception as error:  # as above, and a disk that is full
            raise ValueError(
                f"cannot get {file} of {name!r} from the hub: {_reason(error)}"
            ) from error
        if sizes[file] is not None and place.stat().st_size != sizes[file]:
            raise ValueError(
                f"{str(place)!r} has {place.stat().st_size} bytes, on the hub it has {sizes[file]}"
                f"; delete {str(place.resolve())!r} and run again"
            )
    folder = place.parents[file.count("/")]
    if revision != info.sha:
        _keep_ref(folder, revision)
    return folder


def push(folder: Path | str, name: str, *, private: bool, token: str | None, message: str) -> str:
    """Uploads all files of `folder`, in one commit, to the repository `name`; returns its url.

    The repository is made, private or not, where there is none. token None: the one that
    `hf auth login` or HF_TOKEN left. Hidden files and folders stay here.

    ValueError of one line, which never holds the token: no config.json in `folder`; `name` is no
    owner/name; no token, or one without the right; no network; a public repository where `private`
    is asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    folder = Path(folder)
    if parse(name) != (name, None):
        raise ValueError(f"{name!r} is no name of a repository; write owner/name")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no config.json in {str(folder)!r}; give a folder with a model in the hub's format"
        )
    token = token or get_token()
    if not token:
        raise ValueError(f"no token to write to {name!r}; run `hf auth login` or set HF_TOKEN")
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library's error would show it
        raise ValueError(
            f"the token to write to {name!r} has a character that no token has; copy it again"
        )
    files = sorted(
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )
    hub = HfApi(token=token)
    try:
        try:
            is_private = hub.model_info(name, timeout=TIMEOUT).private
        except RepositoryNotFoundError:
            hub.create_repo(name, private=private)
            is_private = private
        if is_private or not private:
            additions = [CommitOperationAdd(f.as_posix(), str(folder / f)) for f in files]
            return str(hub.create_commit(name, additions, commit_message=message).commit_url)
    except Exception as error:  # noqa: BLE001 (as in download)
        reason = _reason(error, writing=True).replace(token, "[token]")
        # Without its cause: nobody knows what an HTTP library shows of a request.
        raise ValueError(f"cannot push {str(folder)!r} to {name!r}: {reason}") from None
    raise ValueError(f"{name!r} is public already; give another name, or push without private")


def _cached(repository: str, revision: str, files: Sequence[str]) -> Path | None:
    """The folder of the cache that holds all of `files`."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = None
    for file in files:
        try:
            place = try_to_load_from_cache(repository, file, revision=revision)
        except HFValidationError:  # no such name can be on the hub; the hub's call says so
            return None
        if not isinstance(place, str):
            return None
        folder = Path(place).parents[file.count("/")]
    return folder


def _keep_ref(folder: Path, revision: str) -> None:
    """Note which commit a branch is, as huggingface_hub does, for a time without network."""
    ref = folder.parents[1] / "refs" / revision
    temporary = ref.with_name(f"{ref.name}.tmp-{os.getpid()}")
    with contextlib.suppress(OSError):  # of a cache that is not ours to write
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(folder.name, encoding="utf-8")
        temporary.replace(ref)


def _reason(error: Exception, *, writing: bool = False) -> str:
    """What went wrong; and what to do, in a line."""
    from huggingface_hub import errors

    elsewhere = "" if writing else ", or download its files elsewhere and give their folder"
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = _short(" ".join(f"{type(error).__name__}: {error}".split()))
    if isinstance(error, errors.GatedRepoError):
        return "its owner gives access on request; ask on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError) and not writing:
        return (
            "no such repository, or a private one; check the spelling, or run `hf auth login` if "
            "it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision; check the spelling, or leave @ and revision out for main"
    if status in (401, 403, 404) and writing:
        return f"the hub refuses ({status}); use a token with the right to write there"
    if status in (401, 403):
        return f"the hub refuses ({status}); run `hf auth login` with a token that may read it"
    if status is not None:
        return f"the hub answers {status}, {said}; try again later{elsewhere}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        lack = "" if writing else " and the cache does not have it"
        return f"HF_HUB_OFFLINE is set{lack}; unset it{elsewhere}"
    no_answer = (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    if type(error).__module__.split(".")[0] in _HTTP or isinstance(error, no_answer):
        return f"no answer ({said}); check the network{elsewhere}"
    if isinstance(error, errors.HFValidationError):
        return "no name that the hub allows; write owner/name or owner/name@revision"
    return f"{said}; run again{elsewhere}"


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
