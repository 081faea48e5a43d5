"""A training run's folder of the original code <-> our training workdir.

The original's: .hydra/config.yaml, checkpoints-meta/checkpoint.pth, the newest, and snapshots in
checkpoints/. What moves: parameters, their moving average, AdamW's moments and every counter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.convert import names, original_config, torch_files
from sedd_jax.convert.folder import Pretrained, check_tokenizer
from sedd_jax.convert.original_config import FromOriginal
from sedd_jax.data import Tokenizer
from sedd_jax.files import appearing, check_new
from sedd_jax.runs import workdir

YAML = Path(".hydra/config.yaml")
NEWEST = Path("checkpoints-meta/checkpoint.pth")
_MAX_COUNT = 2**31 - 1  # our counters are int32


def _open(source: Path) -> tuple[Path, dict, FromOriginal]:
    """(checkpoint, the original's config, ours) of a run's folder or one of its .pth files.

    ValueError if files are missing.
    """
    source = Path(source)
    folder = source.absolute().parents[1] if source.is_file() else source
    checkpoint = source if source.is_file() else source / NEWEST
    for file in (folder / YAML, checkpoint):
        if not file.is_file():
            raise ValueError(
                f"no {str(file)!r}; give the folder of a run of the original code, or a .pth file "
                "in its checkpoints or checkpoints-meta"
            )
    return checkpoint, *original_config.open_config(folder / YAML)


def _count(facts: Mapping[str, Any], name: str) -> int:
    value = facts.get(name)
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError(
            f"{name} {value!r} of the checkpoint is not in [0, {_MAX_COUNT}]; give a checkpoint "
            "of the original code"
        )
    return value


def read_run(source: Path, weights: str) -> Pretrained:
    """The model of a run: the moving average "ema" of its checkpoint, or the "raw" parameters."""
    checkpoint, theirs, (config, vocab_size, notices) = _open(source)
    part = {"ema": "ema", "raw": "model"}[weights]
    expected = names.expected_tensors(config, vocab_size)
    with torch_files.read(checkpoint, expected, (part,)) as (tensors, facts):
        step = _count(facts, "step")
        params = names.from_original(tensors.part(part), config.model.heads)
    about = {"weights": weights}
    return Pretrained(config, vocab_size, params, None, step, notices, about, theirs)


def import_run(
    source: Path,
    target: Path,
    *,
    tokenizer: Tokenizer,
    optimizer: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write target, a new workdir from which sedd-train goes on where the original stopped.

    source is the original's run folder or one of its .pth files. With optimizer, AdamW's moments
    and the warm-up go on too; without, both begin again. changes are keys of our config to set,
    such as {"data.records": DIR, "model.dtype": "bfloat16"}. Returns notices; ValueError for
    whatever is missing or wrong.
    """
    check_new(Path(target))
    checkpoint, theirs, (config, vocab_size, notices) = _open(source)
    notices = list(notices)
    config = configuration.with_values(
        config, {"data.tokenizer": tokenizer.name, **(changes or {})}
    )
    check_tokenizer(tokenizer, vocab_size, source)
    parts = torch_files.PARTS if optimizer else ("model", "ema")
    expected = names.expected_tensors(config, vocab_size)
    with torch_files.read(checkpoint, expected, parts) as (tensors, facts):
        if not facts:
            raise ValueError(
                f"{str(checkpoint)!r} holds parameters only; give a checkpoint of the original"
            )
        if len(facts["counts"]) > 1:
            raise ValueError(
                f"the optimizer has made from {facts['counts'][0]} to {facts['counts'][-1]} steps, "
                "not the same for every parameter; add --fresh_optimizer"
            )
        step = _count(facts, "step")
        trees = {
            part: names.from_original(tensors.part(part), config.model.heads)
            for part in parts[: 4 if facts["counts"] else 2]
        }
        moments = None
        if facts["counts"]:
            count = _count({"count": facts["counts"][0]}, "count")
            moments = experiment.Moments(count, trees["exp_avg"], trees["exp_avg_sq"])
        else:
            notices.append("AdamW's moments and the warm-up of the learning rate begin again")
    train_state = experiment.imported_state(
        config,
        vocab_size,
        params=trees["model"],
        ema=trees["ema"],
        step=step,
        ema_updates=_count(facts, "ema_updates"),
        moments=moments,
        schedule_count=0 if moments is None else step,
    )
    if facts["ema_decay"] != config.optimizer.ema_decay:
        notices.append(
            f"the checkpoint's ema decay {facts['ema_decay']} is not the config's "
            f"{config.optimizer.ema_decay}, which is used"
        )
    workdir.write_workdir(
        target, config=config, tokenizer=tokenizer, train_state=train_state, original=theirs
    )
    return notices


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
            f"the original cannot go on with {fault}; export --form=hub, which carries the weights"
        )
    train_state = workdir.read_state(ours)
    theirs = original_config.to_original_config(config, vocab_size, ours.original)
    # `train.py +load_dir=OUT` asks for this one, which the original's own runs lack.
    theirs = {**theirs, "work_dir": str(out.absolute())}
    moments = experiment.moments(train_state.opt_state)
    o, step = config.optimizer, int(train_state.step)
    facts = {
        "step": step,
        "counts": [moments.count] if moments.count else [],
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
