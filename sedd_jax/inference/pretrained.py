"""load(): a model from a training run, from an exported folder, or from the Hugging Face hub."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sedd_jax import config as configuration
from sedd_jax import convert, data, experiment
from sedd_jax.convert import weights
from sedd_jax.convert.folder import OURS, PICKLED, Pretrained
from sedd_jax.convert.sisters import FAMILIES
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion.draws import check_settings
from sedd_jax.host import hub
from sedd_jax.host.console import activity
from sedd_jax.host.files import local_path
from sedd_jax.host.imports import FOLDER, import_modules
from sedd_jax.inference.curve import Curve
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import Sampling
from sedd_jax.parallel import processes, sharding
from sedd_jax.parallel.devices import check_platform
from sedd_jax.runs.workdir import open_workdir

log = logging.getLogger(__name__)

SOURCES = (
    "give the workdir of a sedd-train that has saved a checkpoint, an exported folder or a hub id"
)
GPT2_TOKENS = 50257  # the vocabulary of every model that the original code trains on text


@activity("loading the model")
def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    tokenizer: Tokenizer | str | None = None,
    step: int | None = None,
    imports: str | Sequence[str] = (),
) -> SEDD:
    """The model at `source`, with a training run's moving average as its weights.

    source is the workdir of a sedd-train, a folder with config.json and weights as
    `convert.read_folder` reads them (of `save_pretrained`, sedd-convert or the original code), or a
    hub id, "owner/name" or "owner/name@commit"; revision pins the commit of a hub id that names
    none.

    dtype, "float32" or "bfloat16", is that of the matmuls; by default the run's, and float32 for
    the original's weights. mesh spreads weights and batches over its devices as sharding.RULES say;
    by default all is on one device. Of several processes each may have a model of its own, on its
    devices, or all of them one, on a mesh of all devices: then all call this and the model's
    methods alike, and each gets the whole result. tokenizer is needed where the folder
    names none and the vocabulary is not GPT-2's: a Tokenizer, or what data.named_tokenizer takes.
    step is that of a training run's checkpoint; by default the newest is taken. imports are names
    of modules and .py files, which are run, that register what the model uses of its author's own
    (docs/extend.md). A folder's own code is run only if you have named the same on this machine.

    ValueError says what is wrong with the source; nothing is half loaded. What one process of the
    mesh cannot read is an error on all.
    """
    if dtype is not None and dtype not in configuration.DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(configuration.DTYPES)}")
    check_platform()
    check_settings()
    import_modules((imports,) if isinstance(imports, str) else imports)
    is_shared = mesh is not None and processes.is_shared(mesh)

    def read() -> tuple[Pretrained, str | None]:
        return _read(source, revision, tokenizer, step)

    model, workdir = processes.on_all_processes(read) if is_shared else read()
    if is_shared:
        processes.check_same("model", _facts(model))
    where = sharding.tree_shardings(model.params, mesh)
    params = sharding.put_tree("weights", model.params, where)
    model = _assemble(model._replace(params=params), dtype, mesh)
    return dataclasses.replace(model, workdir=workdir)


def import_own(source: str | Path) -> None:
    """Run the modules that a run's or an exported model's folder names, as `load` does."""
    folder = local_path(source)
    form = convert.recognise(folder) if os.path.lexists(folder) else None
    if form == "workdir":
        open_workdir(folder)
    elif form == "hub":
        convert.open_folder(folder)


def _facts(model: Pretrained) -> dict[str, Any]:
    """What all processes must have read alike, besides the weights."""
    return {
        **dict(configuration.flatten(model.config)),
        "step": model.step,
        "tokenizer": model.tokenizer.fingerprint(),
        "curve": model.curve,
    }


def _read(
    source: str | Path, revision: str | None, tokenizer: Tokenizer | str | None, step: int | None
) -> tuple[Pretrained, str | None]:
    """The model at `source`, its weights as numpy arrays, and the run's folder if it is one."""
    folder = local_path(source)
    is_there = os.path.lexists(folder)  # False, and no error, for a name that no file can have
    if step is not None and not (is_there and convert.recognise(folder) == "workdir"):
        raise ValueError(
            f"{str(source)!r} is not a run with checkpoints; leave step {step} out, or name the "
            "run's workdir"
        )
    if not is_there:
        folder = _download(str(source), revision)
    elif revision is not None:
        raise ValueError(f"{str(source)!r} is a folder: revision {revision!r} is for hub ids")
    # A snapshot may hold other files of the repository, as its tokenizer.json: it is no run.
    form = convert.recognise(folder) if is_there else "hub"
    if form == "original":
        raise ValueError(
            f"{str(folder)!r} is a run of the original code; turn it into a folder first: "
            f"sedd-convert --from={folder} --to=FOLDER"
        )
    if form == "hub":
        return _read_folder(folder, tokenizer), None
    if tokenizer is not None:
        raise ValueError(f"{str(folder)!r} has its own tokenizer; leave tokenizer out")
    return convert.read_workdir(folder, step=step), str(folder)


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a hub id; without one, the error asks about a folder of nearly that name."""
    parsed, near = hub.parse(name), _near(name)
    fault = f"no folder at {name!r}"
    if parsed is None:
        no_id = f", and it is not a hub id owner/name; {SOURCES}"
        raise ValueError(fault + (near or no_id))
    repository, pinned = parsed
    if revision is not None and pinned is not None:
        raise ValueError(f"{name!r} names a revision and revision {revision!r} another; give one")
    try:
        folder = weights.download(repository, pinned or revision, optional=[OURS, f"{FOLDER}/*.py"])
        if weights.locate(folder) is None:  # an older model: torch's own format, read by a child
            folder = hub.download(repository, folder.name, [PICKLED])
    except ValueError as error:
        raise ValueError(fault + (near or f", and as a hub id: {error}")) from error
    if folder.name != (pinned or revision):
        log.info("%s is at commit %s; pass it as revision to pin it", repository, folder.name)
    return folder


def _near(name: str) -> str:
    """A question about a folder of nearly that name; empty where there is none."""
    parent = local_path(name).parent
    folders = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, folders, n=1, cutoff=0.8)
    return f"; did you mean {str(parent / near[0])!r}?" if near else ""


def _read_folder(folder: Path, tokenizer: Tokenizer | str | None) -> Pretrained:
    model = convert.open_folder(folder)
    tokenizer = tokenizer or model.tokenizer
    known = GPT2_TOKENS, GPT2_TOKENS + len(FAMILIES[model.family].special)
    if tokenizer is None and model.vocab_size not in known:
        raise ValueError(
            f"the folder names no tokenizer for its {model.vocab_size} tokens; give "
            "--tokenizer and --tokenizer_path (in Python tokenizer='NAME:PATH'), or tokenizer "
            f"'ids:{model.vocab_size}' to read and write ids as numbers"
        )
    if tokenizer is None:
        try:
            tokenizer = data.named_tokenizer("gpt2")  # the only one of the original code
        except ValueError as error:
            raise ValueError(
                f"{str(folder)!r} holds no tokenizer; give --tokenizer=gpt2 "
                f"--tokenizer_path=FOLDER (in Python tokenizer='gpt2:FOLDER'): {error}"
            ) from error
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = data.named_tokenizer(tokenizer)
    tokenizer = convert.fitted(tokenizer, model)
    convert.check_tokenizer(tokenizer, model.vocab_size, folder)
    params = convert.read_params(folder, model)
    for notice in model.notices:  # not before an error, which is one line
        log.info("%s", notice)
    return model._replace(params=params, tokenizer=tokenizer)


def _assemble(model: Pretrained, dtype: str | None, mesh: Mesh | None) -> SEDD:
    config = model.config
    if dtype is not None:
        config = configuration.with_values(config, {"model.dtype": dtype})
    graph = experiment.make_graph(config, model.vocab_size)
    return SEDD(
        network=experiment.make_model(config, graph, mesh),
        params=model.params,
        graph=graph,
        schedule=experiment.make_schedule(config),
        tokenizer=model.tokenizer,
        length=config.data.length,
        sampling=Sampling.of(config.sample),
        objective=experiment.make_objective(config),
        experiment=config.to_dict(),
        mesh=mesh,
        curve=_curve(model),
        step=model.step,
        about=model.about,
        original=model.original,
    )


def _curve(model: Pretrained) -> Curve | None:
    """The curve that came with the model; None, with a warning, for what is no curve."""
    try:
        return None if model.curve is None else Curve.from_dict(model.curve)
    except (ValueError, LookupError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("the model's curve of cross entropy is left out, it is damaged (%s)", reason)
        return None
