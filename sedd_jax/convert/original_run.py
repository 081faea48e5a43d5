"""A training run's folder of the original code <-> our training workdir.

The original's: .hydra/config.yaml, checkpoints-meta/checkpoint.pth, the newest, and snapshots in
checkpoints/. What moves: parameters, their moving average, AdamW's moments and every counter.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml

from sedd_jax import experiment
from sedd_jax.convert import names, original_config, torch_files
from sedd_jax.convert.folder import Pretrained
from sedd_jax.host.files import appearing, check_new
from sedd_jax.runs import workdir

YAML = Path(".hydra/config.yaml")
NEWEST = Path("checkpoints-meta/checkpoint.pth")
_MAX_COUNT = 2**31 - 1  # our counters are int32


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError(
            f"{name} {value!r} of the checkpoint is not in [0, {_MAX_COUNT}]; give a checkpoint "
            "of the original code"
        )
    return value


def _checkpoint(source: Path) -> Path:
    return source if source.is_file() else source / NEWEST


def open_run(source: Path) -> Pretrained:
    """The model of a run, without its parameters and its step."""
    file = (source.absolute().parents[1] if source.is_file() else source) / YAML
    checkpoint = _checkpoint(source)
    if checkpoint.is_file():
        torch_files.check_archive(checkpoint)
    for needed in (file, checkpoint):
        if not needed.is_file():
            raise ValueError(
                f"no {str(needed)!r} for {str(source)!r}; give the folder of a run of the original "
                "code, or a .pth file in its checkpoints or checkpoints-meta"
            )
    theirs, (config, vocab_size, notices) = original_config.open_config(file)
    return Pretrained(config, vocab_size, None, notices=notices, original=theirs)


def _read(source: Path, parts: Sequence[str]) -> tuple[Pretrained, dict[str, dict], dict]:
    """(the model without parameters, our tree by part, the checkpoint's facts) of a run."""
    model, file = open_run(source), _checkpoint(source)
    where, heads = repr(str(file)), model.config.model.heads
    expected = names.expected_tensors(model.config, model.vocab_size)
    with torch_files.read(file, expected, parts) as (tensors, facts):
        if not facts:
            raise ValueError(
                f"{where} holds parameters only; give a checkpoint of a run of the original code, "
                "with step, moving average and optimizer"
            )
        step = _count(facts["step"], f"step in {where}")
        trees = {part: names.from_original(tensors[part], heads, where) for part in tensors}
    return model._replace(step=step), trees, facts


def read_run(source: Path, weights: str) -> Pretrained:
    """The model of a run: the moving average "ema" of its checkpoint, or the "raw" parameters.

    source is the original's run folder or one of its .pth files, here and below. ValueError for
    whatever is missing or wrong.
    """
    part = {"ema": "ema", "raw": "model"}[weights]
    model, trees, _ = _read(source, (part,))
    return model._replace(params=trees[part], about={"weights": weights})


def read_training(source: Path, *, optimizer: bool) -> tuple[Pretrained, dict[str, Any]]:
    """(the model, arguments of `experiment.imported_state`) to go on where the original stopped.

    With optimizer, AdamW's moments and the warm-up go on too; without, both begin again.
    """
    parts = torch_files.PARTS if optimizer else ("model", "ema")
    model, trees, facts = _read(source, parts)
    counts, notices, decay = facts["counts"], [*model.notices], model.config.optimizer.ema_decay
    if len(counts) > 1:
        raise ValueError(
            f"the optimizer has made from {counts[0]} to {counts[-1]} steps, not the same for "
            "every parameter; add --fresh_optimizer"
        )
    state = {
        "params": trees["model"],
        "ema": trees["ema"],
        "step": model.step,
        "ema_updates": _count(facts["ema_updates"], "ema_updates"),
    }
    if counts:
        count = _count(counts[0], "count")
        state["moments"] = optax.ScaleByAdamState(count, trees["exp_avg"], trees["exp_avg_sq"])
    else:
        notices.append("AdamW's moments and the warm-up of the learning rate begin again")
    if facts["ema_decay"] != decay:
        notices.append(
            f"the checkpoint's ema decay {facts['ema_decay']} is not the config's {decay}, which "
            "is used"
        )
    return model._replace(params=trees["ema"], notices=tuple(notices)), state


def export_run(source: Path, out: Path) -> int:
    """Write out, a run folder of the original with which its training goes on from our workdir's.

    .hydra/config.yaml and checkpoints-meta/checkpoint.pth; needs torch. Returns the step.
    ValueError if out is there and not empty, or our config says what the original has no field for.
    """
    out = Path(out)
    check_new(out)
    ours = workdir.open_workdir(source)
    config, vocab_size = ours.config, ours.tokenizer.vocab_size
    for fault in original_config.cannot_say(config):
        raise ValueError(
            f"the original cannot go on with {fault}; train with that, or export --form=hub, which "
            "carries the weights"
        )
    train_state = workdir.read_state(ours)
    theirs = original_config.to_original_config(config, vocab_size, ours.original)
    # `train.py +load_dir=OUT` asks for this one, which the original's own runs lack.
    theirs = {**theirs, "work_dir": str(out.absolute())}
    moments = experiment.moments(train_state.opt_state)
    o, step = config.optimizer, int(train_state.step)
    facts = {
        "step": step,
        "counts": [int(moments.count)] if moments.count else [],
        "ema_decay": o.ema_decay,
        "ema_updates": int(train_state.ema_updates),
        "optimizer": {
            "lr": o.learning_rate * min(step / max(o.warmup_steps, 1), 1.0),
            "betas": (o.b1, o.b2),
            "eps": o.eps,
            "weight_decay": o.weight_decay,
        },
    }
    parts = {
        "model": names.state_dict(train_state.params),
        "ema": names.to_original(train_state.ema),
    }
    if moments.count:
        # First moments may be bfloat16 here; the original's are not.
        mu = jax.tree.map(lambda a: np.asarray(a, np.float32), moments.mu)
        parts |= {"exp_avg": names.to_original(mu), "exp_avg_sq": names.to_original(moments.nu)}
    with appearing(out) as part:
        for file in (YAML, NEWEST):
            (part / file).parent.mkdir()
        # Through JSON: nothing but plain values, and no aliases.
        text = yaml.safe_dump(json.loads(json.dumps(theirs)), sort_keys=False)
        (part / YAML).write_text(text, encoding="utf-8")
        (part / YAML).with_name("hydra.yaml").write_text("hydra: {}\n", encoding="utf-8")
        torch_files.write(part / NEWEST, parts, facts)
    return step
