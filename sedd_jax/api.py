"""A trained model as one object: load it, sample from it, infill with it.

model = sedd_jax.load("runs/quickstart")
model.sample(4, steps=128, seed=0)  # list[str]
model.infill("The [MASK:20] statement", steps=128, seed=0)
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax import config as configuration
from sedd_jax import data, evaluate
from sedd_jax.checkpoint import Checkpoints, with_shardings
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion import samplers
from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.samplers import Known, Samples
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, eq=False)  # eq=False: the object is its own jit cache key
class SEDD:
    """A network with its weights, its process and its tokenizer."""

    network: Transformer
    params: Any  # the moving average, float32
    graph: Graph
    schedule: Schedule
    tokenizer: Tokenizer
    length: int  # tokens of the blocks it was trained on
    config: Any
    step: int  # of the checkpoint

    @property
    def score_fn(self) -> ScoreFn:
        """(xt [B, L], sigma [B, 1]) -> Scores: the seam that losses and samplers take."""
        return make_score_fn(self.network, self.params, self.graph)

    def sample(self, num_samples: int = 1, **options) -> list[str]:
        """Texts of `length` tokens; options as in `sample_tokens`."""
        return self.decode(self.sample_tokens(num_samples, **options).tokens)

    def infill(self, template: str, num_samples: int = 1, **options) -> list[str]:
        """Texts with "[MASK:n]" in the template replaced by n sampled tokens."""
        known = data.parse_template(template, self.tokenizer, self.length)
        return self.decode(self.sample_tokens(num_samples, known=known, **options).tokens)

    def sample_tokens(
        self,
        num_samples: int = 1,
        *,
        steps: int = 128,
        seed: int = 0,
        predictor: str = "tweedie",
        draw: str = "exact",
        t_min: float = 1e-5,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        frames: int = 0,
    ) -> Samples:
        """Samples int32 [num_samples, L], L the model's length or that of known.

        known is (tokens int32, is_known bool), tokens to keep: [L] for all, or [num_samples, L].
        steps network calls and one for the denoiser; another number of steps or another seed does
        not recompile.
        """
        _check("num_samples", num_samples, 1, 2**31 - 1)
        _check("steps", steps, 1, 10**6)
        _check("seed", seed, 0, 2**32 - 1)
        for name, value, table in (
            ("predictor", predictor, samplers.PREDICTORS),
            ("draw", draw, samplers.DRAWS),
        ):
            if value not in table:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(table)}")
        length = self.length if known is None else np.shape(known[0])[-1]
        if length > self.length:
            raise ValueError(
                f"{length} positions are more than the model's length {self.length}; shorten them"
            )
        if known is not None:
            tokens, is_known = np.asarray(known[0]), np.asarray(known[1])
            if is_known.any() and not 0 <= tokens[is_known].min() <= tokens[is_known].max() < (
                self.graph.vocab_size
            ):
                raise ValueError(
                    f"known tokens must be in [0, {self.graph.vocab_size}); encode them with the "
                    "model's tokenizer"
                )
            shape = (num_samples, length)
            known = Known(np.broadcast_to(tokens, shape), np.broadcast_to(is_known, shape))
        return self._sample(
            self.params,
            jax.random.key(seed),
            jnp.int32(steps),
            jnp.float32(t_min),
            known,
            shape=(num_samples, length),
            predictor=predictor,
            draw=draw,
            frames=frames,
        )

    @functools.cached_property
    def _sample(self):
        @functools.partial(jax.jit, static_argnames=("shape", "predictor", "draw", "frames"))
        def run(params, key, steps, t_min, known, *, shape, predictor, draw, frames):
            return samplers.sample(
                key,
                make_score_fn(self.network, params, self.graph),
                self.graph,
                self.schedule,
                shape,
                steps=steps,
                predictor=samplers.PREDICTORS[predictor],
                known=known,
                t_min=t_min,
                draw=samplers.DRAWS[draw],
                frames=frames,
            )

        return run

    def bound(
        self,
        blocks: np.ndarray | data.Blocks,
        *,
        passes: int = 16,
        batch_size: int = 32,
        seed: int = 0,
        target_standard_error: float | None = None,
        max_passes: int = 1024,
        progress: bool = False,
    ) -> evaluate.CorpusBound:
        """Upper bound on -log p of int32 [N, L] together, nats: passes + 2 network calls a block.

        passes is even; a call takes batch_size blocks. Times and noise depend on seed and a
        block's place alone. With target_standard_error, nats per token, the blocks are gone
        through again, each time with new noise, until the error is there or the next round would
        take more than max_passes.
        """
        _check("seed", seed, 0, 2**32 - 1)
        if target_standard_error is not None and not target_standard_error > 0.0:
            raise ValueError(
                f"target_standard_error {target_standard_error} is not above 0; give nats per token"
            )
        blocks = blocks if isinstance(blocks, data.Blocks) else data.Blocks(blocks)
        key = jax.random.key(seed)

        def one_round(r: int) -> evaluate.CorpusBound:
            return evaluate.corpus_bound(
                self._bound_fn,
                self.params,
                jax.random.fold_in(key, r),
                blocks,
                passes=passes,
                batch_size=batch_size,
                t_min=self.config.objective.t_min,
                progress=progress,
            )

        if target_standard_error is None:
            return one_round(0)
        most = max(1, max_passes // max(passes, 1))
        return evaluate.bound_until(one_round, target_standard_error * blocks.count, most)

    @functools.cached_property
    def _bound_fn(self) -> evaluate.BoundFn:
        def score_fn(params, is_token):
            return make_score_fn(self.network, params, self.graph, is_token=is_token)

        t_min = self.config.objective.t_min
        return evaluate.make_bound_fn(score_fn, self.graph, self.schedule, t_min=t_min)

    def decode(self, tokens: jax.Array) -> list[str]:
        """A text for each row of int32 [B, L]; masked positions show as ░."""
        return [self.tokenizer.decode(row) for row in np.asarray(tokens)]


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} {value} is not in [{least}, {most}]; choose another")


def load(workdir: str | Path) -> SEDD:
    """The newest checkpoint's moving average in a training run's folder."""
    workdir = Path(workdir)
    files = [workdir / name for name in ("config.json", "tokenizer.json", "checkpoints")]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(
            f"{str(workdir)!r} holds no training run: {', '.join(missing)} missing; give the "
            "--workdir of a sedd-train that has saved a checkpoint"
        )
    config = configuration.from_json(files[0].read_text(encoding="utf-8"))
    configuration.check(config)
    tokenizer = data.tokenizer_from_dict(json.loads(files[1].read_text(encoding="utf-8")))
    graph = configuration.make_graph(config, tokenizer.vocab_size)
    network = configuration.make_model(config, graph)
    shape = jax.eval_shape(lambda: configuration.init_params(config, network, jax.random.key(0)))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda leaf: one_device, shape)
    with Checkpoints(files[2], read_only=True) as checkpoints:
        step, params = checkpoints.restore_ema(with_shardings(shape, shardings))
    return SEDD(
        network=network,
        params=params,
        graph=graph,
        schedule=configuration.make_schedule(config),
        tokenizer=tokenizer,
        length=config.data.length,
        config=config,
        step=step,
    )
