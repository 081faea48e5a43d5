"""The Hugging Face hub: what is named owner/name@revision.

huggingface_hub is imported by the calls that need it; its cache, HF_HOME, HF_HUB_OFFLINE and
HF_TOKEN mean here what they mean there.
"""

import logging
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
    names may be patterns. What the cache has is not downloaded again. Where the hub does not
    answer, the cache is enough if it has all of these files that the hub had.

    ValueError of one line: no such repository, revision or file; no right to read it; no network
    and not in the cache; a download that broke off, or a file of the cache that is not whole.
    """
    from huggingface_hub import HfApi, get_token, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    name = repository if revision is None else f"{repository}@{revision}"
    patterns = [*optional, *files]
    if revision is not None and COMMIT.fullmatch(revision):
        folder = _cached(repository, revision, patterns)
        if folder is not None:
            return folder
    # One request: snapshot_download would try again for 20 seconds before it reports no answer.
    try:
        _check_token(get_token())
        info = HfApi().model_info(
            repository, revision=revision, timeout=TIMEOUT, files_metadata=True
        )
    except Exception as error:  # the hub's own errors, its HTTP library's and the system's
        folder = _cached(repository, revision, files, optional)
        # That a revision is gone is news, not a fault of the network.
        if folder is not None and not isinstance(error, RevisionNotFoundError):
            reason = _reason(error, is_cached=True).split(";")[0]
            log.info("%s is taken from the cache: %s", name, reason)
            return folder
        raise ValueError(f"cannot get {name!r} from the hub: {_reason(error)}") from error

    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for file in files:
        if file not in sizes:
            raise ValueError(
                f"no {file} in {name!r} on the hub, which has {_short(', '.join(sizes)) or 'none'};"
                " give the name of a repository that has it"
            )
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # as above, and a disk that is full
        raise ValueError(f"cannot get {name!r} from the hub: {_reason(error)}") from error
    for file in filter_repo_objects(sizes, allow_patterns=patterns):
        path = folder / file
        size = path.stat().st_size if path.is_file() else -1
        if sizes[file] not in (None, size):
            raise ValueError(
                f"{str(path)!r} has {max(size, 0)} bytes, on the hub it has {sizes[file]}; "
                f"delete {str(path.resolve())!r} and run again"
            )
    return folder


def push(folder: Path | str, name: str, *, private: bool, token: str | None, message: str) -> str:
    """Uploads all files of `folder`, in one commit, to the repository `name`; returns its url.

    The repository is made, private or not, where there is none. token None: the one that
    `hf auth login` or HF_TOKEN left. Hidden files and folders stay here.

    ValueError of one line, which never holds the token: no config.json in `folder`; `name` is no
    owner/name; no token, or one without the right; no network; a public repository where `private`
    is set.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    folder = Path(folder)
    if parse(name) != (name, None):
        raise ValueError(f"{name!r} is not the name of a repository; write owner/name")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no config.json in {str(folder)!r}; give a folder with a model in the hub's format"
        )
    token = token or get_token()
    if not token:
        raise ValueError(f"no token to write to {name!r}; run `hf auth login` or set HF_TOKEN")
    _check_token(token)
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
            # upload_folder may make several commits, the first of them without the weights.
            additions = [CommitOperationAdd(f.as_posix(), str(folder / f)) for f in files]
            return str(hub.create_commit(name, additions, commit_message=message).commit_url)
    except Exception as error:  # noqa: BLE001 (as in download)
        reason = _reason(error, writing=True).replace(token, "[token]")
        # Without its cause: nobody knows what an HTTP library shows of a request.
        raise ValueError(f"cannot push {str(folder)!r} to {name!r}: {reason}") from None
    raise ValueError(f"{name!r} is public already; give another name, or push without private")


class _OddToken(ValueError):
    """Says what to do, and not what the token is."""


def _check_token(token: str | None) -> None:
    """_OddToken for one that cannot be in a request: an HTTP library's error would show it."""
    if token and not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token):
        raise _OddToken(
            "the token has a character that no token has; copy it again into HF_TOKEN or with "
            "`hf auth login`, or unset HF_TOKEN"
        )


def _cached(
    repository: str, revision: str | None, files: Sequence[str], optional: Sequence[str] = ()
) -> Path | None:
    """The cache's folder that has all of `files`, and of `optional` all that the hub had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = [*optional, *files]
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if all((folder / file).is_file() for file in files) else None


def _reason(error: Exception, *, writing: bool = False, is_cached: bool = False) -> str:
    """What went wrong; and what to do, in a line."""
    from huggingface_hub import errors

    elsewhere = "" if writing else ", or download its files elsewhere and give their folder"
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = _short(" ".join(f"{type(error).__name__}: {error}".split()))
    if isinstance(error, _OddToken):
        return str(error)
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
        return (
            f"the hub refuses ({status}) the token; set HF_TOKEN to one that may read it, or unset "
            "HF_TOKEN and run `hf auth login`"
        )
    if status is not None:
        return f"the hub answers {status}, {message}; try again later{elsewhere}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        lack = "" if writing or is_cached else " and the cache does not have it"
        return f"HF_HUB_OFFLINE is set{lack}; unset it{elsewhere}"
    no_answer = (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    if type(error).__module__.split(".")[0] in _HTTP or isinstance(error, no_answer):
        return f"no answer ({message}); check the network, and HF_ENDPOINT if it is set{elsewhere}"
    if isinstance(error, errors.HFValidationError):
        return "no name that the hub allows; write owner/name or owner/name@revision"
    if isinstance(error, OSError):  # after those of the network
        return f"{message}; see to the cache's folder, HF_HOME, and its disk{elsewhere}"
    return f"{message}; run again{elsewhere}"


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
