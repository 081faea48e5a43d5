"""Sampling of an autoregressive model: from left to right, with keys and values in a cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.diffusion import autoregressive
from sedd_jax.diffusion.autoregressive import Written
from sedd_jax.diffusion.reverse import greedy
from sedd_jax.diffusion.samplers import Known
from sedd_jax.inference.batches import Texts
from sedd_jax.inference.sampling import LEFT_TO_RIGHT, SHAPES, Rows, Sampling
from sedd_jax.models.head import clean_logits
from sedd_jax.models.in_loop import cut_blocks, joined_blocks, params_in_loop

CAN = "an absorbing or uniform model"  # what does what an autoregressive model cannot


@dataclasses.dataclass(frozen=True)
class AutoregressiveSampler:
    """A network call for each token that is not known; see `states.Sampler`."""

    model: Any  # a SEDD

    def chosen(self, **options: Any) -> Sampling:
        usual = Sampling(steps=self.model.length, predictor=LEFT_TO_RIGHT)
        shapes = {name: getattr(self.model.sampling, name) for name in (*SHAPES, "greedy")}
        chosen = usual.replaced(**shapes).replaced(**options)
        for name, value in dataclasses.asdict(chosen).items():
            if name not in shapes and value != getattr(usual, name):
                raise ValueError(
                    f"{name} {value!r} is of reverse steps, and an autoregressive model writes "
                    "from left to right, a network call a token; leave it at "
                    f"{getattr(usual, name)!r}, or use {CAN}"
                )
        return chosen

    def check_known(self, known: Known) -> None:
        is_gap = ~known.is_known[:, :-1] & known.is_known[:, 1:]
        if is_gap.any():
            row, position = np.argwhere(is_gap)[0]
            raise ValueError(
                f"sample {row} has a known token at position {position + 1} after a free one, and "
                "an autoregressive model writes from left to right and knows only what comes "
                f"before; give known tokens as a prefix, or use {CAN} to infill"
            )

    def steps(self, texts: Texts, sampling: Sampling) -> int:
        return texts.known.tokens.shape[1]

    def start(self, key: jax.Array, rows: Rows, texts: Texts) -> Rows:
        network, mask = self.model.network, self.model.graph.mask
        cache = prefill(self.model.params, rows.known, network=network, mask=mask)
        tokens = jnp.where(rows.known.is_known, rows.known.tokens, mask)
        return rows._replace(chain=Written(tokens, rows.chain.calls, cache))

    def advance(
        self, key: jax.Array, rows: Rows, begin: np.int32, end: np.int32, sampling: Sampling
    ) -> Rows:
        *text, cache = rows.chain
        how = {"network": self.model.network, "graph": self.model.graph}
        rows = rows._replace(chain=text)
        chain = write(self.model.params, key, rows, cache, begin, end, sampling, **how)
        return rows._replace(chain=chain)

    def noise_levels(self, steps: np.ndarray, sampling: Sampling) -> None:
        return None  # what is not written yet is masked


def first_free(known: Known) -> jax.Array:
    """The first position that is free in any row, int32 []; the number of positions if none is."""
    is_free = ~known.is_known.all(axis=0)
    return jnp.where(is_free.any(), is_free.argmax(), len(is_free))


@functools.partial(jax.jit, static_argnames=("network", "mask"))
def prefill(params, known: Known, *, network, mask) -> list[Any]:
    """Keys and values of what every row knows, by one call; those of other positions are nothing
    that is ever read. A list of the blocks'."""
    before = autoregressive.shifted(known.tokens, mask)
    sigma = autoregressive.no_noise(before)

    def call():
        how = {"deterministic": True, "mutable": ["cache"]}
        return network.apply({"params": params}, before, sigma, **how)[1]["cache"]

    def empty():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(call))

    return cut_blocks(jax.lax.cond(first_free(known) > 0, call, empty)["blocks"])


@functools.partial(jax.jit, static_argnames=("network", "graph"), donate_argnames="cache")
def write(
    params, key, rows: Rows, cache, begin, end, sampling: Sampling, *, network, graph
) -> Written:
    """rows.chain, (tokens, calls), after the positions begin <= l < end."""
    weights = params_in_loop(network, params)

    def next_scores(tokens, position, cache):
        variables = {"params": weights(), "cache": {"blocks": joined_blocks(cache)}}
        sigma = autoregressive.no_noise(tokens)
        how = {"deterministic": True, "position": position, "mutable": ["cache"]}
        output, new = network.apply(variables, tokens, sigma, **how)
        scores = clean_logits(output, graph.vocab_size, network.placement)
        return scores, cut_blocks(new["cache"]["blocks"])

    return autoregressive.sample(
        key,
        next_scores,
        graph.mask,
        Written(*rows.chain, cache),
        rows.known,
        begin=jnp.maximum(begin, first_free(rows.known)),
        end=end,
        index=rows.index,
        shape=greedy if sampling.greedy else sampling.options().shape,
    )
