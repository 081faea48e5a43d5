"""A training run's folder of the original code <-> our training workdir.

The original's: .hydra/config.yaml, checkpoints-meta/checkpoint.pth, the newest, and snapshots in
checkpoints/. What moves: parameters, their moving average, AdamW's moments and every counter.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.convert import names, original_config, torch_files
from sedd_jax.convert.folder import check_tokenizer
from sedd_jax.data import Tokenizer
from sedd_jax.files import appearing, check_new
from sedd_jax.runs import workdir

YAML = Path(".hydra/config.yaml")
NEWEST = Path("checkpoints-meta/checkpoint.pth")
_MOST_STEPS = 2**31 - 1  # our counters are int32


class OriginalRun(NamedTuple):
    """What a run of the original is, without its weights."""

    checkpoint: Path
    config: ConfigDict
    vocab_size: int
    theirs: dict
    notices: tuple[str, ...]


def open_original_run(source: Path) -> OriginalRun:
    """A run's folder, or one of its .pth files; ValueError if files are missing."""
    source = Path(source)
    folder = source.absolute().parents[1] if source.is_file() else source
    checkpoint = source if source.is_file() else source / NEWEST
    for file in (folder / YAML, checkpoint):
        if not file.is_file():
            raise ValueError(
                f"no {str(file)!r}; give the folder of a run of the original code, or a .pth file "
                "in its checkpoints or checkpoints-meta"
            )
    theirs = original_config.read_config(folder / YAML)
    config, vocab_size, notices = original_config.from_original_config(theirs, str(folder / YAML))
    return OriginalRun(checkpoint, config, vocab_size, theirs, notices)


def read_original_weights(run: OriginalRun, weights: str) -> tuple[int, dict]:
    """(step, parameters) of a run's checkpoint: its moving average "ema", or "raw"."""
    sizes = names.sizes_of(run.config, run.vocab_size)
    part = {"ema": "ema", "raw": "model"}[weights]
    with _read(run, sizes, (part,)) as read:
        return _count(read.facts, "step"), names.from_original(read.part(part), sizes.heads)


def _read(run: OriginalRun, sizes: names.Sizes, parts: Sequence[str]):
    expected, optional = names.expected_tensors(sizes), names.buffer_shape(sizes)
    return torch_files.read(run.checkpoint, expected, optional=optional, parts=parts)


def _count(facts: Mapping[str, Any], name: str) -> int:
    value = facts.get(name)
    if type(value) is not int or not 0 <= value <= _MOST_STEPS:
        raise ValueError(
            f"{name} {value!r} of the checkpoint is not in [0, {_MOST_STEPS}]; give a checkpoint "
            "of the original code"
        )
    return value


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
    and the warm-up go on too; without, both begin again. changes are keys of our
    config to set, such as {"data.records": DIR, "model.dtype": "bfloat16"}. Returns notices;
    ValueError for whatever is missing or wrong.
    """
    check_new(Path(target))
    run = open_original_run(source)
    notices = list(run.notices)
    config = run.config
    config.data.tokenizer = tokenizer.name
    config = configuration.with_values(config, changes or {})
    check_tokenizer(tokenizer, run.vocab_size, source)
    sizes = names.sizes_of(config, run.vocab_size)

    parts = torch_files.PARTS if optimizer else ("model", "ema")
    with _read(run, sizes, parts) as read:
        facts = read.facts
        if not facts:
            raise ValueError(
                f"{str(run.checkpoint)!r} holds parameters only; give a checkpoint of the original"
            )
        step = _count(facts, "step")

        def tree(part: str) -> dict:
            return names.from_original(read.part(part), sizes.heads)

        names.check_buffer(read.part("model"), sizes, repr(str(run.checkpoint)))
        moments = None
        if facts["moments"]:
            moments = experiment.Moments(
                _count(facts, "count"), tree("exp_avg"), tree("exp_avg_sq")
            )
        else:
            notices.append("AdamW's moments and the warm-up of the learning rate begin again")
        train_state = experiment.imported_state(
            config,
            run.vocab_size,
            params=tree("model"),
            ema=tree("ema"),
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
        target, config=config, tokenizer=tokenizer, train_state=train_state, original=run.theirs
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
    # `train.py +load_dir=OUT` asks for these two, which the original's own runs lack.
    theirs = {**theirs, "work_dir": str(out.absolute())}
    sizes = names.sizes_of(config, vocab_size)
    moments = experiment.moments(train_state.opt_state)
    o, step = config.optimizer, int(train_state.step)
    facts = {
        "step": step,
        "count": moments.count,
        "ema_decay": o.ema_decay,
        "ema_updates": int(train_state.ema_updates),
        "optimizer": {
            "lr": o.learning_rate * min(step / max(o.warmup_steps, 1), 1.0),
            "betas": (o.b1, o.b2),
            "eps": o.eps,
            "weight_decay": o.weight_decay,
        },
    }
    parts = {"ema": names.to_original(train_state.ema)}
    if moments.count:
        parts |= {
            "exp_avg": names.to_original(_float32(moments.mu)),
            "exp_avg_sq": names.to_original(moments.nu),
        }
    with appearing(out) as part:
        for file in (YAML, NEWEST):
            (part / file).parent.mkdir()
        (part / YAML).write_text(_yaml(theirs), encoding="utf-8")
        (part / YAML).with_name("hydra.yaml").write_text("hydra: {}\n", encoding="utf-8")
        model = _state_dict(names.to_original(train_state.params), sizes)
        torch_files.write(part / NEWEST, model, parts, facts)
    return step


def _float32(tree: Any) -> Any:
    """First moments may be kept in bfloat16; the original's are not."""
    return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


def _yaml(config: dict) -> str:
    # Through JSON: nothing but plain values, and no aliases.
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)


def _state_dict(tensors: dict, sizes: names.Sizes) -> dict:
    """With the buffer, where the original's state dict has it: after the noise level's layers."""
    ordered = {}
    for name, array in tensors.items():
        if name.startswith("blocks.") and names.BUFFER not in ordered:
            ordered |= names.buffer(sizes)
        ordered[name] = array
    return ordered
