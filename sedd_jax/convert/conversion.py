"""One call for every direction: what the source is, is seen from its files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.convert import folder as hub
from sedd_jax.convert import names, original_config, original_run
from sedd_jax.convert.folder import Pretrained
from sedd_jax.data import Tokenizer
from sedd_jax.files import check_new
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
) -> Conversion:
    """Convert source, whose form is seen from its files, to target in the given form.

    source: a hub folder, a run folder of the original or one of its .pth files, or our workdir.
    form: "hub", the folder that both codes load; "original", a run folder from which the original
      trains on; "workdir", one from which sedd-train does.
    weights: "ema" or "raw", which of a run's go into a hub folder.
    optimizer: whether AdamW's moments go into a workdir.
    tokenizer: the model's, where the source does not hold it; a workdir needs one.
    changes: keys of our config to set in a workdir.
    """
    source, target, changes = Path(source), Path(target), changes or {}
    for name, value, known in (("form", form, FORMS), ("weights", weights, ("ema", "raw"))):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    read = recognise(source)
    _check_options(str(source), read, form, weights, optimizer, tokenizer, changes)
    (hub.check_replaceable if form == "hub" else check_new)(target)  # before the weights are read
    if form == "original":
        original_run.export_run(source, target)
        notices = ()
    elif (read, form) == ("original", "workdir"):
        options = {"optimizer": optimizer, "changes": changes}
        notices = original_run.import_run(source, target, tokenizer=_needed(tokenizer), **options)
    else:
        model = _READERS[read](source, weights)
        model = model._replace(tokenizer=tokenizer or model.tokenizer)
        notices = [*model.notices, *_tokenizer_notices(model, source)]
        if form == "workdir":
            _start(model, target, changes)
            notices.append("training starts at step 0: a hub folder holds no optimizer")
        else:
            values = model._asdict()
            del values["notices"]
            hub.write_folder(target, **values)
    if form == "hub":
        config, vocab_size, step = model.config, model.vocab_size, model.step
    else:
        run = workdir.open_workdir(source if form == "original" else target)
        config, vocab_size = run.config, run.tokenizer.vocab_size
        step = workdir.newest_step(run)
    expected = names.expected_tensors(config, vocab_size)
    return Conversion(
        read=FORMS[read].words,
        wrote=FORMS[form].words,
        graph=config.graph.name,
        parameters=sum(math.prod(shape) for shape in expected.values()),
        tensors=len(expected) + 1,
        step=step,
        notices=tuple(notices),
        next=FORMS[form].next.format(target=target.absolute() if form == "original" else target),
    )


def recognise(source: Path) -> str:
    """One of FORMS; ValueError, with what was looked for, if it is none."""
    if (source.suffix == ".pth" and source.is_file()) or (source / original_run.YAML).is_file():
        return "original"
    if (source / workdir.CONFIG).is_file():
        return "workdir" if (source / workdir.CHECKPOINTS).is_dir() else "hub"
    raise ValueError(
        f"{str(source)!r} is no .pth file of a run, and no folder with {original_run.YAML} or "
        f"{hub.CONFIG}; give a hub folder, a run of the original, or a workdir"
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
    # The original loads a hub folder as it is.
    if form != "hub" and (form == read or (read, form) == ("hub", "original")):
        raise ValueError(
            f"{source!r} is a {FORMS[read].words}, which needs no conversion to form {form!r}; "
            f"choose another --form of {', '.join(FORMS)}"
        )
    if changes and form != "workdir":
        raise ValueError(f"config.{next(iter(changes))} can be set with --form=workdir only")
    fault = None
    if weights != "ema" and (read == "hub" or form != "hub"):
        fault = f"--weights={weights} is for a run or a workdir, to --form=hub"
    elif not optimizer and (read, form) != ("original", "workdir"):
        fault = "--fresh_optimizer is for a run of the original, to --form=workdir"
    elif tokenizer is not None and form == "original":
        fault = "--tokenizer is for --form=hub or workdir: a run of the original holds none"
    if fault:
        raise ValueError(f"{fault}; leave it out")
    for key, value in changes.items():
        configuration.check_value(key, value)


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError("a workdir needs the model's tokenizer; add --tokenizer=gpt2, or its own")
    return tokenizer


def _tokenizer_notices(model: Pretrained, source: Path) -> list[str]:
    """What `load` will lack; ValueError if the tokenizer is not the model's."""
    if model.tokenizer is not None:
        hub.check_tokenizer(model.tokenizer, model.vocab_size, source)
    # Without a tokenizer, load takes that of GPT-2.
    elif original_config.TOKENIZERS.get(model.vocab_size) != "gpt2":
        return [f"no tokenizer is known for {model.vocab_size} tokens; add --tokenizer"]
    return []


def _from_workdir(source: Path, weights: str) -> Pretrained:
    ours = workdir.open_workdir(source)
    if weights == "ema":  # whose numbers sedd-report has written
        (step, params), about = workdir.read_average(ours), workdir.about(ours)
    else:
        train_state, about = workdir.read_state(ours), {"weights": weights}
        step, params = int(train_state.step), train_state.params
    vocab_size = ours.tokenizer.vocab_size
    return Pretrained(
        ours.config, vocab_size, params, ours.tokenizer, step, (), about, ours.original
    )


_READERS = {
    "hub": lambda source, weights: hub.read_folder(source),
    "original": original_run.read_run,
    "workdir": _from_workdir,
}


def _start(model: Pretrained, target: Path, changes: Mapping[str, Any]) -> None:
    """Write a workdir at step 0 whose parameters are the model's: training it further."""
    tokenizer, params = _needed(model.tokenizer), model.params
    config = configuration.with_values(model.config, {"data.tokenizer": tokenizer.name, **changes})
    train_state = experiment.imported_state(config, model.vocab_size, params=params, ema=params)
    workdir.write_workdir(
        target,
        config=config,
        tokenizer=tokenizer,
        train_state=train_state,
        original=model.original,
    )
