"""PLAID's network: the same transformer, between learned embeddings of tokens.

Noised embeddings and an estimate of the clean ones go in, logits of the clean tokens come out, to
which the likelihood of each token given its noised embedding is added. What is outside of the
transformer is float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd_jax.diffusion import gaussian
from sedd_jax.diffusion.draws import categorical
from sedd_jax.diffusion.gaussian import EmbeddingDiffusion, LearnedSchedule
from sedd_jax.diffusion.scores import Tokens
from sedd_jax.kernels import for_platform, vocab_reduce
from sedd_jax.kernels.matmul import Precision, einsum
from sedd_jax.models.transformer import Output, Transformer
from sedd_jax.parallel.sharding import Placement

# The noise levels that training begins with.
GAMMA_0, GAMMA_1 = -3.0, 6.0
# Of the parameters, which are divided by their norm: the smaller, the faster the embeddings learn.
# PLAID has a learning rate for them, 7 times the network's.
EMBEDDING_NORM = 1 / 7
# Logits that exist at a time: whole rows of the vocabulary, for as many positions as fit.
LOGITS = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**26}


class Plaid(Transformer):
    """(z [B, L, C], gamma [B, 1], the previous estimate [B, L, C]) -> Output for `dim` tokens.

    C = embedding_dim. The logits of the output lack the output prior, see `HeadClean`.
    """

    embedding_dim: int = 16

    def example(self, length: int) -> tuple[jax.Array, ...]:
        latent = jnp.zeros((1, length, self.embedding_dim))
        return latent, jnp.zeros((1, 1)), latent

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        gamma: jax.Array,
        previous: jax.Array,
        *,
        deterministic: bool,
        is_token: jax.Array | None = None,
    ) -> Output:
        size, zeros = self.embedding_dim, nn.initializers.zeros_init()
        normal = nn.initializers.normal(EMBEDDING_NORM * size**-0.5)
        self.param("embeddings", normal, (self.dim, size))
        self.param("gamma_0", nn.initializers.constant(GAMMA_0), ())
        self.param("gamma_log_range", nn.initializers.constant(math.log(GAMMA_1 - GAMMA_0)), ())
        self.param("gamma_log_weights", zeros, (gaussian.BINS,))

        def embedded(name, **how):
            how |= {"use_bias": False, "precision": Precision.HIGHEST}
            return nn.Dense(self.hidden_size, name=name, **how)

        # Both inputs at variance 1: an embedding's C components have 1 / C each.
        variance = jax.nn.sigmoid(-gamma) / size + jax.nn.sigmoid(gamma)
        x = embedded("input")(z * jax.lax.rsqrt(variance)[..., None])
        x += embedded("self_conditioning", kernel_init=zeros)(previous * size**0.5)
        return super().__call__(x, gamma, deterministic=deterministic, is_token=is_token)


@dataclasses.dataclass(frozen=True)
class HeadClean:
    """gaussian.Clean from the last hidden state: its logits plus prior . e_v for each token v."""

    output: Output
    prior: jax.Array  # float32 [B, L, C]: gaussian.output_prior
    embeddings: jax.Array  # float32 [V, C]
    placement: Placement

    def mean(self) -> jax.Array:
        return self.mean_and_log_p(jnp.zeros(self.prior.shape[:2], jnp.int32))[0]

    def mean_and_log_p(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        def answer(logits, embeddings, token):
            log_p = jax.nn.log_softmax(logits)
            return einsum("v,vc->c", jnp.exp(log_p), embeddings), log_p[token]

        return self._each(answer, tokens)

    def draw(self, keys: jax.Array, is_greedy: bool = False) -> Tokens:
        if is_greedy:
            return self._each(lambda logits, _: jnp.argmax(logits).astype(jnp.int32))
        split = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        keys = split(keys, jnp.arange(self.prior.shape[1]))
        return self._each(lambda logits, _, key: categorical(key, logits), keys)

    def _each(self, answer: Callable, *rows: jax.Array) -> Any:
        """answer(logits [V], embeddings, *row []) at each position, rows [B, L]; [B, L, ...].

        Each device computes its rows, and has the logits of a block of positions at a time: the
        backward pass computes them again.
        """
        hidden, weight, bias = self.output

        def local(rows, head):
            weight, bias, embeddings = head

            @jax.checkpoint
            def at_position(row):
                hidden, prior, *row = row
                logits = vocab_reduce.logits(hidden, weight, bias)
                return answer(logits + einsum("c,vc->v", prior, embeddings), embeddings, *row)

            batch, length = rows[0].shape[:2]
            block = for_platform(LOGITS, self.placement.platform) // len(weight)
            block = max(1, min(block, batch * length))
            flat = jax.tree.map(lambda a: a.reshape(batch * length, *a.shape[2:]), rows)
            out = jax.lax.map(at_position, flat, batch_size=block)
            return jax.tree.map(lambda a: a.reshape(batch, length, *a.shape[1:]), out)

        head = weight, bias, self.embeddings
        return self.placement.over_rows(local, (hidden, self.prior, *rows), head)


def make_embedding_diffusion(
    model: Plaid,
    params: Any,
    *,
    dropout_key: jax.Array | None = None,
    is_token: jax.Array | None = None,
) -> EmbeddingDiffusion:
    """The network with these parameters; dropout acts if it gets a key.

    is_token, bool [B, L], marks what is not padding in the rows that it will be called with.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    raw = model.placement.whole(params["embeddings"])
    schedule = (params[f"gamma_{name}"] for name in ("0", "log_range", "log_weights"))

    def network(z, gamma, previous, embeddings):
        how = {"is_token": is_token, "deterministic": not rngs, "rngs": rngs}
        output = model.apply({"params": params}, z, gamma, previous, **how)
        prior = gaussian.output_prior(z, gamma)
        return HeadClean(output, prior, embeddings, model.placement)

    embeddings = raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)
    return EmbeddingDiffusion(embeddings, LearnedSchedule(*schedule), network)
