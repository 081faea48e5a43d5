"""The fields of the original's config: what each may hold, and what it is called here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

GRAPHS = {"absorb": "absorbing", "uniform": "uniform"}
NOISES = {"loglinear": "log_linear", "geometric": "geometric"}
PREDICTORS = {"analytic": "tweedie", "euler": "euler", "none": "none"}
NO_CLIP = 1e30  # our clip_norm for the original's negative grad_clip, which turns clipping off


class Kind(NamedTuple):
    """What a field may hold."""

    holds: Callable[[Any], bool]
    words: str


def _whole(least: int, most: int) -> Kind:
    # type, because True is an int to isinstance
    return Kind(lambda x: type(x) is int and least <= x <= most, f"an integer in [{least}, {most}]")


def _number(least: float, most: float) -> Kind:
    def holds(x: Any) -> bool:
        return type(x) in (int, float) and least <= x <= most  # False for NaN

    return Kind(holds, f"a number in [{least:g}, {most:g}]")


def _one_of(table) -> Kind:
    return Kind(lambda x: isinstance(x, str) and x in table, f"one of {', '.join(table)}")


_TRUTH = Kind(lambda x: type(x) is bool, "true or false")
_TEXT = Kind(lambda x: isinstance(x, str) and len(x) < 1000, "text")
NEEDED = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the original: theirs is its place, ours the place of what it means here."""

    theirs: str
    kind: Kind
    missing: Any  # what the original's own config has
    ours: str = ""
    to_ours: Callable[[Any], Any] = lambda x: x
    to_theirs: Callable[[Any], Any] = lambda x: x


def _swap(table: Mapping[str, str]) -> Callable[[str], str]:
    back = {ours: theirs for theirs, ours in table.items()}
    return lambda name: back[name]


def _clip_to_ours(norm: float) -> float:
    return NO_CLIP if norm < 0 else float(norm)


FIELDS = (
    Field("tokens", _whole(2, 2**24), NEEDED),
    Field("graph.type", _one_of(GRAPHS), NEEDED, "graph.name", GRAPHS.get, _swap(GRAPHS)),
    Field("noise.type", _one_of(NOISES), NEEDED, "schedule.name", NOISES.get, _swap(NOISES)),
    Field("noise.sigma_min", _number(1e-30, 80), 1e-4, "schedule.sigma_min", float),
    Field("noise.sigma_max", _number(1e-30, 80), 20, "schedule.sigma_max", float),
    Field("model.name", _TEXT, "small"),
    Field("model.type", _one_of(("ddit",)), "ddit"),
    Field("model.hidden_size", _whole(2, 2**16), NEEDED, "model.hidden_size"),
    Field("model.cond_dim", _whole(1, 2**16), NEEDED, "model.cond_dim"),
    Field("model.length", _whole(1, 2**24), 1024, "data.length"),
    Field("model.n_blocks", _whole(1, 2**10), NEEDED, "model.blocks"),
    Field("model.n_heads", _whole(1, 2**10), NEEDED, "model.heads"),
    Field("model.scale_by_sigma", _TRUTH, NEEDED, "graph.scale_by_sigma"),
    Field("model.dropout", _number(0, 0.999), 0.1, "model.dropout", float),
    Field("optim.optimizer", _one_of(("AdamW", "Adam")), "AdamW"),
    Field("optim.lr", _number(1e-30, 1e30), 3e-4, "optimizer.learning_rate", float),
    Field("optim.beta1", _number(0, 1 - 1e-9), 0.9, "optimizer.b1", float),
    Field("optim.beta2", _number(0, 1 - 1e-9), 0.999, "optimizer.b2", float),
    Field("optim.eps", _number(1e-30, 1), 1e-8, "optimizer.eps", float),
    Field("optim.weight_decay", _number(0, 1e6), 0, "optimizer.weight_decay", float),
    Field("optim.warmup", _whole(0, 2**40), 2500, "optimizer.warmup_steps"),
    Field(
        "optim.grad_clip",
        _number(-1e6, NO_CLIP),
        1.0,
        "optimizer.clip_norm",
        _clip_to_ours,
        lambda norm: -1.0 if norm == NO_CLIP else norm,
    ),
    Field("training.batch_size", _whole(1, 2**30), 512, "train.batch_size"),
    Field("training.accum", _whole(1, 2**30), 1, "train.microbatches"),
    # The original goes on while step < n_iters + 1: one step more than its name says.
    Field("training.n_iters", _whole(1, 2**40), 1_300_001, "train.steps"),
    Field("training.log_freq", _whole(1, 2**40), 50, "train.log_every"),
    Field("training.snapshot_freq_for_preemption", _whole(1, 2**40), 10_000, "checkpoint.every"),
    Field("training.ema", _number(0, 1 - 1e-9), 0.9999, "optimizer.ema_decay", float),
    Field("data.train", _TEXT, "openwebtext"),
    Field(
        "sampling.predictor",
        _one_of(PREDICTORS),
        "euler",
        "sample.predictor",
        PREDICTORS.get,
        _swap(PREDICTORS),
    ),
    Field("sampling.steps", _whole(1, 2**30), 128, "sample.steps"),
    Field("sampling.noise_removal", _TRUTH, True),
)

# Fields that the original's programs read, or its configs have, and that mean nothing here.
THEIRS_ALONE = {
    "ngpus": 1,
    "training.snapshot_freq": 50_000,
    "training.eval_freq": 100,
    "training.weight": "standard",
    # Its snapshots need a GPT-2 tokenizer, and GPT-2 large to score them.
    "training.snapshot_sampling": False,
    "data.cache_dir": "data",
    "graph.file": "data",
    "graph.report_all": False,
    "eval.perplexity": False,
    "eval.perplexity_batch_size": 32,
}
