"""load(): a model from a training run, from an exported folder, or from the Hugging Face hub."""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import convert, data, sharding
from sedd_jax.api import SEDD
from sedd_jax.checkpoint import Checkpoints, with_shardings
from sedd_jax.convert.folder import CONFIG, OURS, PICKLED, WEIGHTS
from sedd_jax.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

RUN = ("config.json", "tokenizer.json", "checkpoints")  # what a training run's folder holds
SOURCES = (
    "give the workdir of a sedd-train that has saved a checkpoint, an exported folder or a hub id"
)
GPT2_TOKENS = 50257  # the vocabulary of every model that the original code trains on text


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    tokenizer: Tokenizer | str | None = None,
) -> SEDD:
    """The model at `source`: its moving average, where a training run kept one.

    source is the workdir of a sedd-train, a folder with config.json and model.safetensors (of
    `save_pretrained`, sedd-convert or the original code), or a hub id, "owner/name" or
    "owner/name@commit"; revision pins the commit of a hub id that names none.

    dtype, "float32" or "bfloat16", is that of the matrix products; by default a run's own, and
    float32 for the original's weights. mesh spreads weights and batches over its devices as
    sharding.RULES say; by default all is on one device. tokenizer is needed where the folder does
    not tell and the vocabulary is not GPT-2's: a Tokenizer, a name, or "name:path".

    ValueError says what is wrong with the source; nothing is half loaded.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source), revision)
    elif revision is not None:
        raise ValueError(f"{str(source)!r} is a folder: revision {revision!r} is for hub ids")
    read = _reader(folder)
    if dtype is not None and dtype not in configuration.DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(configuration.DTYPES)}")
    return read(folder, dtype=dtype, mesh=mesh, tokenizer=tokenizer)


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a hub id."""
    from sedd_jax.data import hub

    found = hub.parse(name)
    if found is None:
        raise ValueError(f"no folder at {name!r}, and it is no hub id owner/name; {SOURCES}")
    repository, pinned = found
    if revision is not None and pinned is not None:
        raise ValueError(f"{name!r} names a revision and revision {revision!r} another; give one")
    try:
        folder = hub.download(repository, pinned or revision, [CONFIG], optional=[OURS, WEIGHTS])
        if not (folder / WEIGHTS).is_file():  # an older model: torch's own format, read by a child
            folder = hub.download(repository, folder.name, [PICKLED])
    except ValueError as error:
        raise ValueError(f"no folder at {name!r}, and as a hub id: {error}") from error
    if folder.name != (pinned or revision):
        log.info("%s is at commit %s; pass it as revision to pin it", repository, folder.name)
    return folder


def _reader(folder: Path) -> Callable[..., SEDD]:
    """How to read the folder; ValueError tells what was looked for."""
    if all((folder / name).exists() for name in RUN):
        return _load_run
    if (folder / CONFIG).is_file() and any((folder / n).is_file() for n in (WEIGHTS, PICKLED)):
        return _load_folder
    if (folder / ".hydra").is_dir() or folder.suffix == ".pth":
        raise ValueError(
            f"{str(folder)!r} is a run of the original code; turn it into a folder first: "
            f"sedd-convert --from={folder} --to=FOLDER"
        )
    missing = [name for name in RUN if not (folder / name).exists()]
    raise ValueError(
        f"{str(folder)!r} holds no model: neither a training run ({', '.join(missing)} missing) "
        f"nor {CONFIG} with {WEIGHTS} or {PICKLED}; {SOURCES}"
    )


def _load_run(
    workdir: Path, *, dtype: str | None, mesh: Mesh | None, tokenizer: Tokenizer | str | None
) -> SEDD:
    if tokenizer is not None:
        raise ValueError(f"{str(workdir)!r} has its own tokenizer; leave tokenizer out")
    config = configuration.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    configuration.check(config)
    found = json.loads((workdir / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = data.tokenizer_from_dict(found)
    shape, shardings = _places(config, tokenizer.vocab_size, mesh)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, params = checkpoints.restore_ema(with_shardings(shape, shardings))
    about = _about(workdir, config)
    return _assemble(config, params, tokenizer, dtype, step=step, mesh=mesh, about=about)


def _load_folder(
    folder: Path, *, dtype: str | None, mesh: Mesh | None, tokenizer: Tokenizer | str | None
) -> SEDD:
    found = convert.read_folder(folder)
    if tokenizer is None and found.tokenizer is not None:
        tokenizer = data.tokenizer_from_dict(found.tokenizer)
    tokenizer = _make_tokenizer(tokenizer, found.vocab_size)
    if tokenizer.vocab_size != found.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model in "
            f"{str(folder)!r} {found.vocab_size}; give the one that it was trained with"
        )
    _, shardings = _places(found.config, found.vocab_size, mesh)
    params = jax.device_put(found.params, shardings)
    rest = {"step": found.step, "about": found.about, "original": found.original}
    return _assemble(found.config, params, tokenizer, dtype, mesh=mesh, **rest)


def _make_tokenizer(tokenizer: Tokenizer | str | None, vocab_size: int) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer is None:
        if vocab_size != GPT2_TOKENS:
            raise ValueError(
                f"the folder names no tokenizer for its {vocab_size} tokens; pass tokenizer="
                f'"name" or "name:path", or "ids:{vocab_size}" to read and write ids as numbers'
            )
        tokenizer = "gpt2"  # all that the original code knows
    name, _, path = tokenizer.partition(":")
    return data.make_tokenizer(name, path, None)  # its files are all it needs: no corpus


def _places(config: ConfigDict, vocab_size: int, mesh: Mesh | None) -> tuple[Any, Any]:
    """Shapes of the parameters, and the sharding of each."""
    network = configuration.make_model(config, configuration.make_graph(config, vocab_size))
    init = functools.partial(configuration.init_params, config, network)
    shape = jax.eval_shape(init, jax.random.key(0))
    if mesh is not None:
        return shape, sharding.tree_shardings(shape, mesh)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return shape, jax.tree.map(lambda leaf: one_device, shape)


def _assemble(config, params, tokenizer: Tokenizer, dtype: str | None, **rest: Any) -> SEDD:
    if dtype is not None:
        config = config.copy_and_resolve_references()
        config.model.dtype = dtype
    graph = configuration.make_graph(config, tokenizer.vocab_size)
    return SEDD(
        network=configuration.make_model(config, graph),
        params=params,
        graph=graph,
        schedule=configuration.make_schedule(config),
        tokenizer=tokenizer,
        length=config.data.length,
        config=config,
        **rest,
    )


def _about(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """What a model card tells of a run: its corpus, and the numbers of sedd-report."""
    about: dict[str, Any] = {"corpus": config.data.corpus, "numbers": []}
    summary = workdir / "summary.json"
    if summary.is_file():
        heldout = json.loads(summary.read_text(encoding="utf-8"))["heldout"]
        how = (
            f"upper bound, {heldout['passes']} noise levels a block, {heldout['blocks']} blocks of "
            f"split {heldout['split']!r}, step {heldout['step']}, seed {heldout['seed']}"
        )
        for unit in ("bits_per_character", "nats_per_token"):
            value, error = (heldout[unit][key] for key in ("bound", "bound_standard_error"))
            number = {"name": unit.replace("_", " "), "value": f"{value:.3f} +- {error:.3f}"}
            about["numbers"].append({**number, "how": how})
    return about
