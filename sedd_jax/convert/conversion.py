"""One call for every direction: what the source is, is seen from its files."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.convert import folder as hub
from sedd_jax.convert import names, original_config, original_run
from sedd_jax.convert.card import facts_of_run
from sedd_jax.convert.folder import Pretrained
from sedd_jax.convert.sisters import FAMILIES
from sedd_jax.data import Tokenizer
from sedd_jax.host.files import check_new, local_path
from sedd_jax.parallel.devices import check_platform
from sedd_jax.runs import workdir


class _Form(NamedTuple):
    """A form that a model has on disk."""

    words: str
    next: str  # the command that one would run now on {target}


FORMS = {
    "hub": _Form(
        "hub folder", "python -c \"import sedd_jax; print(sedd_jax.load('{target}').sample(1))\""
    ),
    "original": _Form("run of the original", "python train.py +load_dir={target}"),
    "workdir": _Form("workdir of sedd-train", "sedd-train --workdir={target}"),
}


# What the weights were made for: with another value they are of other shapes or mean nothing.
_FIXED = [key for key in hub.SHAPING if key.startswith(("graph.", "model."))]


class Conversion(NamedTuple):
    """What was read and written, for a table."""

    read: str
    wrote: str
    graph: str
    parameters: int
    tensors: int  # of the original's, the buffer included
    step: int | None
    notices: tuple[str, ...]
    next: str  # the command that one would run now


def convert(
    source: str | Path,
    target: str | Path,
    *,
    form: str = "hub",
    weights: str = "ema",
    optimizer: bool = True,
    tokenizer: Tokenizer | None = None,
    changes: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Conversion:
    """Convert source, whose form is seen from its files, to target in the given form.

    source: a hub folder, a run folder of the original or one of its .pth files, or our workdir.
    form: "hub", the folder that both codes load; "original", a run folder from which the original
      trains on; "workdir", one from which sedd-train does.
    weights: "ema" or "raw", which of a run's go into a hub folder.
    optimizer: whether AdamW's moments go into a workdir.
    tokenizer: the model's, where the source does not hold it; a workdir needs one.
    changes: keys of our config to set in a workdir.
    replace: whether a hub folder takes the place of an earlier one at target.
    """
    source, target, changes = local_path(source), local_path(target), changes or {}
    read = recognise(source)
    _check_options(str(source), read, form, weights, optimizer, tokenizer, changes)
    # All that can be refused without the weights is, before they are read.
    hub.check_target(target, replace) if form == "hub" else check_new(target)
    if "workdir" in (read, form):
        check_platform()
    model = _OPEN[read](source)
    tokenizer, config, vocab_size = tokenizer or model.tokenizer, model.config, model.vocab_size
    tokenizer = hub.fitted(tokenizer, model)
    if tokenizer is not None or form == "workdir":
        hub.check_tokenizer(tokenizer, vocab_size, source)
    if form == "workdir":
        config = _changed(config, {"data.tokenizer": tokenizer.name, **changes}, source)
    if form == "original":
        step, notices = original_run.export_run(source, target), ()
    else:
        model, state = _read(model, source, read, form, weights, optimizer)
        step, notices = model.step, model.notices
    if form == "workdir":
        step = state.get("step", 0)
        workdir.write_workdir(
            target,
            config=config,
            tokenizer=tokenizer,
            train_state=experiment.imported_state(config, vocab_size, **state),
            original=model.original,
        )
    elif form == "hub":
        hub.write_folder(target, model._replace(tokenizer=tokenizer), replace=replace)
    family, where = FAMILIES[model.family], target.absolute() if form == "original" else target
    expected = names.expected_tensors(config, vocab_size)
    return Conversion(
        read=FORMS[read].words if not family.marks else f"{family.title} folder",
        wrote=FORMS[form].words,
        graph=config.graph.name,
        parameters=sum(math.prod(shape) for shape in expected.values()),
        tensors=len(expected) + 1,
        step=step,
        notices=(*notices, *_left_to_do(form, step, config, tokenizer, vocab_size)),
        next=FORMS[form].next.format(target=where),
    )


def _left_to_do(
    form: str, step: int | None, config: ConfigDict, tokenizer: Tokenizer | None, vocab_size: int
) -> Iterator[str]:
    """Notices of what must be done before the result can be used."""
    if form == "original" and step >= config.train.steps:
        yield (
            f"the run is at step {step} of its {config.train.steps}: to go on, raise "
            f"training.n_iters in {original_run.YAML}"
        )
    # Without a tokenizer, load takes that of GPT-2.
    if tokenizer is None and original_config.TOKENIZERS.get(vocab_size) != "gpt2":
        yield (
            f"no tokenizer is known for {vocab_size} tokens: load takes tokenizer=, or convert "
            "again with --tokenizer and --replace"
        )


def _changed(config: ConfigDict, changes: Mapping[str, Any], source: Path) -> ConfigDict:
    """The config with these keys set; ValueError for one that the weights do not allow."""
    for key, value in configuration.flatten(config):
        if key in _FIXED and changes.get(key, value) != value:
            raise ValueError(
                f"config.{key} {changes[key]!r} cannot be set: the weights in {str(source)!r} are "
                f"those of {value!r}; leave it out"
            )
    return configuration.with_values(config, changes)


def recognise(source: Path) -> str:
    """One of FORMS; ValueError, with what was looked for, if it is none."""
    is_pth = source.suffix == ".pth" and source.is_file()
    if is_pth or (source / original_run.YAML.parent).is_dir():
        return "original"
    if (source / workdir.CONFIG).is_file():
        is_run = any((source / n).exists() for n in (workdir.TOKENIZER, workdir.CHECKPOINTS))
        return "workdir" if is_run else "hub"
    raise ValueError(
        f"{str(source)!r} holds no model: it is not a .pth file of a run, and no folder with "
        f"{original_run.YAML} or {hub.CONFIG}"
        + (
            workdir.run_around(source)
            or "; give the workdir of a sedd-train, a hub folder, or a run of the original"
        )
    )


def _check_options(
    source: str,
    read: str,
    form: str,
    weights: str,
    optimizer: bool,
    tokenizer: Tokenizer | None,
    changes: Mapping[str, Any],
) -> None:
    """ValueError for a conversion that is none, or an option that would have no effect."""
    for name, value, known in (("form", form, FORMS), ("weights", weights, ("ema", "raw"))):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    # The original loads a hub folder of SEDD as it is.
    if form != "hub" and (form == read or (read, form) == ("hub", "original")):
        fault = f"which needs no conversion to form {form!r}"
        if form != read:
            fault = "of which no run of the original is made"
        raise ValueError(
            f"{source!r} is a {FORMS[read].words}, {fault}; choose another --form: "
            + " or ".join(one for one in FORMS if one not in (form, read))
        )
    for has_no_effect, fault in (
        (
            changes and form != "workdir",
            f"config.{next(iter(changes), '')} can be set with --form=workdir only",
        ),
        (
            weights != "ema" and (read == "hub" or form != "hub"),
            f"--weights={weights} is for a run or a workdir, to --form=hub",
        ),
        (
            not optimizer and (read, form) != ("original", "workdir"),
            "--fresh_optimizer is for a run of the original, to --form=workdir",
        ),
        (
            tokenizer is not None and form == "original",
            "--tokenizer is for --form=hub or workdir: a run of the original holds none",
        ),
    ):
        if has_no_effect:
            raise ValueError(f"{fault}; leave it out")
    for key, value in changes.items():
        configuration.check_value(key, value)


def _read(
    model: Pretrained, source: Path, read: str, form: str, weights: str, optimizer: bool
) -> tuple[Pretrained, dict[str, Any]]:
    """(the opened model and its parameters, arguments of `experiment.imported_state`)."""
    if (read, form) == ("original", "workdir"):
        return original_run.read_training(source, optimizer=optimizer)
    if read == "original":
        model = original_run.read_run(source, weights)
    elif read == "workdir":
        model = read_workdir(source, weights)
    else:
        model = model._replace(params=hub.read_params(source, model))
    if form == "workdir":
        fresh = "training starts at step 0: a hub folder holds no optimizer"
        model = model._replace(notices=(*model.notices, fresh))
    return model, {"params": model.params, "ema": model.params}


def _of_run(run: workdir.Workdir) -> Pretrained:
    """The model of a training run, without its parameters and its step."""
    vocab_size = run.tokenizer.vocab_size
    curve = workdir.read_curve(run)
    original = run.original
    return Pretrained(run.config, vocab_size, None, run.tokenizer, original=original, curve=curve)


_OPEN = {
    "hub": hub.open_folder,
    "original": original_run.open_run,
    "workdir": lambda source: _of_run(workdir.open_workdir(source)),
}


def read_workdir(
    source: Path | str, weights: str = "ema", *, step: int | None = None
) -> Pretrained:
    """The model of a run: its moving average as numpy arrays, or its "raw" parameters.

    step: of the checkpoint with that average; None for the newest.
    """
    run = workdir.open_workdir(local_path(source))
    if weights == "ema":  # whose numbers sedd-report has written
        (step, params), about = workdir.read_average(run, step), facts_of_run(run)
    else:
        train_state, about = workdir.read_state(run), {"weights": weights}
        step, params = int(train_state.step), train_state.params
    return _of_run(run)._replace(params=params, step=step, about=about)
