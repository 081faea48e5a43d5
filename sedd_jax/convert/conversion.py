"""One call for every direction: what the source is, is seen from its files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.convert import folder as hub
from sedd_jax.convert import names, original_config, run
from sedd_jax.convert.folder import Pretrained
from sedd_jax.data import Tokenizer
from sedd_jax.files import check_new
from sedd_jax.runs import workdir

FORMS = ("hub", "original", "workdir")
WEIGHTS = ("ema", "raw")
_NO_TOKENIZER = "a workdir needs the model's tokenizer; add --tokenizer=gpt2, or its own"


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
    """Convert source, whose kind is seen from its files, to target in the given form.

    source: a hub folder, a run folder of the original or one of its .pth files, or our workdir.
    form: "hub", the folder that both codes load; "original", a run folder from which the original
      trains on; "workdir", one from which sedd-train does.
    weights: "ema" or "raw", which of a run's go into a hub folder.
    optimizer: whether AdamW's moments go into a workdir.
    tokenizer: the model's, where the source does not hold it; a workdir needs one.
    changes: keys of our config to set in a workdir.
    """
    source, target = Path(source), Path(target)
    for name, value, known in (("form", form, FORMS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    kind = recognise(source)
    # The original loads a hub folder as it is; the other two are there already.
    if (kind, form) in (("hub", "original"), ("run", "original"), ("workdir", "workdir")):
        raise ValueError(
            f"{str(source)!r} is a {_KINDS[kind]}, which needs no conversion to form {form!r}; "
            f"choose another --form of {', '.join(FORMS)}"
        )
    if changes and form != "workdir":
        raise ValueError(f"config.{next(iter(changes))} can be set with --form=workdir only")
    for fault in _ignored(kind, form, weights, optimizer, tokenizer):
        raise ValueError(f"{fault}; leave it out")
    for key, value in (changes or {}).items():
        configuration.check_value(key, value)
    (hub.check_replaceable if form == "hub" else check_new)(target)  # before the weights are read
    if form == "original":
        return _export(source, target)
    if form == "workdir" and kind == "run":
        return _import(source, target, tokenizer, optimizer, changes)
    model = _READERS[kind](source, weights)
    model = model._replace(tokenizer=tokenizer or model.tokenizer)
    if model.tokenizer is not None:
        hub.check_tokenizer(model.tokenizer, model.vocab_size, source)
    elif (
        original_config.TOKENIZERS.get(model.vocab_size) != "gpt2"
    ):  # which is what load would take
        notice = f"no tokenizer is known for {model.vocab_size} tokens; add --tokenizer"
        model = model._replace(notices=(*model.notices, notice))
    if form == "workdir":
        model = _start(model, target, changes or {})
        next_command = _train(target)
    else:
        values = model._asdict()
        del values["notices"]
        hub.write_folder(target, **values)
        next_command = f"python -c \"import sedd_jax; print(sedd_jax.load('{target}').sample(1))\""
    return _summary(
        kind, form, model.config, model.vocab_size, model.step, model.notices, next_command
    )


def _ignored(kind, form, weights, optimizer, tokenizer) -> list[str]:
    """Options that would have no effect."""
    faults = []
    if weights != "ema" and (kind == "hub" or form != "hub"):
        faults.append(f"--weights={weights} is for a run or a workdir, to --form=hub")
    if not optimizer and (kind, form) != ("run", "workdir"):
        faults.append("--fresh_optimizer is for a run of the original, to --form=workdir")
    if tokenizer is not None and form == "original":
        faults.append("--tokenizer is for --form=hub or workdir: a run of the original holds none")
    return faults


_KINDS = {"hub": "hub folder", "run": "run of the original", "workdir": "workdir of sedd-train"}
_FORM_KIND = {"hub": "hub", "original": "run", "workdir": "workdir"}


def recognise(source: Path) -> str:
    """One of "hub", "run", "workdir"; ValueError, with what was looked for, if it is none."""
    if source.suffix == ".pth" and source.is_file():
        return "run"
    if (source / run.YAML).is_file():
        return "run"
    if (source / workdir.CONFIG).is_file():
        return "workdir" if (source / workdir.CHECKPOINTS).is_dir() else "hub"
    raise ValueError(
        f"{str(source)!r} is no .pth file of a run, and no folder with {run.YAML} or "
        f"{hub.CONFIG}; give a hub folder, a run of the original, or a workdir"
    )


def _from_hub(source: Path, weights: str) -> Pretrained:
    return hub.read_folder(source)


def _from_run(source: Path, weights: str) -> Pretrained:
    theirs = run.open_original_run(source)
    step, params = run.read_original_weights(theirs, weights)
    return Pretrained(
        config=theirs.config,
        vocab_size=theirs.vocab_size,
        params=params,
        tokenizer=None,
        step=step,
        notices=theirs.notices,
        about={"weights": weights},
        original=theirs.theirs,
    )


def _from_workdir(source: Path, weights: str) -> Pretrained:
    ours = workdir.open_workdir(source)
    if weights == "ema":  # whose numbers sedd-report has written
        (step, params), about = workdir.read_average(ours), workdir.about(ours)
    else:
        train_state, about = workdir.read_state(ours), {"weights": weights}
        step, params = int(train_state.step), train_state.params
    return Pretrained(
        config=ours.config,
        vocab_size=ours.tokenizer.vocab_size,
        params=params,
        tokenizer=ours.tokenizer,
        step=step,
        notices=(),
        about=about,
        original=ours.original,
    )


_READERS = {"hub": _from_hub, "run": _from_run, "workdir": _from_workdir}


def _start(model: Pretrained, target: Path, changes: Mapping[str, Any]) -> Pretrained:
    """A workdir at step 0 whose parameters are the model's: training it further."""
    if model.tokenizer is None:
        raise ValueError(_NO_TOKENIZER)
    config = configuration.with_values(
        model.config, {"data.tokenizer": model.tokenizer.name, **changes}
    )
    params = model.params
    train_state = experiment.imported_state(config, model.vocab_size, params=params, ema=params)
    workdir.write_workdir(
        target,
        config=config,
        tokenizer=model.tokenizer,
        train_state=train_state,
        original=model.original,
    )
    notice = "training starts at step 0: a hub folder holds no optimizer"
    return model._replace(config=config, step=0, notices=(*model.notices, notice))


def _export(source: Path, target: Path) -> Conversion:
    step = run.export_run(source, target)
    ours = workdir.open_workdir(source)
    next_command = f"python train.py +load_dir={target.absolute()}"
    vocab_size = ours.tokenizer.vocab_size
    return _summary("workdir", "original", ours.config, vocab_size, step, (), next_command)


def _import(source, target, tokenizer, optimizer, changes) -> Conversion:
    if tokenizer is None:
        raise ValueError(_NO_TOKENIZER)
    notices = run.import_run(
        source, target, tokenizer=tokenizer, optimizer=optimizer, changes=changes
    )
    ours = workdir.open_workdir(target)
    vocab_size, step = ours.tokenizer.vocab_size, workdir.newest_step(ours)
    return _summary("run", "workdir", ours.config, vocab_size, step, notices, _train(target))


def _train(target: Path) -> str:
    return f"sedd-train --workdir={target}"


def _summary(kind, form, config, vocab_size, step, notices, next_command) -> Conversion:
    expected = names.expected_tensors(names.sizes_of(config, vocab_size))
    count = sum(math.prod(shape) for shape in expected.values())
    return Conversion(
        read=_KINDS[kind],
        wrote=_KINDS[_FORM_KIND[form]],
        graph=config.graph.name,
        parameters=count,
        tensors=len(expected) + 1,
        step=step,
        notices=tuple(notices),
        next=next_command,
    )
