"""Sampling of a PLAID model: reverse steps of the embeddings, and a draw of the tokens."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from sedd_jax.diffusion import gaussian
from sedd_jax.diffusion.samplers import Known
from sedd_jax.inference.batches import Texts
from sedd_jax.inference.sampling import GAUSSIAN, Rows, Sampling
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.in_loop import params_in_loop
from sedd_jax.parallel import processes

OPTIONS = ("steps", "greedy")  # of Sampling, that mean something here
CAN = "an absorbing or uniform model"  # what does what a PLAID model cannot


@dataclasses.dataclass(frozen=True)
class PlaidSampler:
    """gaussian.sample; see `states.Sampler`."""

    model: Any  # a SEDD

    def chosen(self, **options: Any) -> Sampling:
        ours = {name: getattr(self.model.sampling, name) for name in OPTIONS}
        usual = Sampling(predictor=GAUSSIAN).replaced(**ours)
        chosen = usual.replaced(**options)
        for name, value in dataclasses.asdict(chosen).items():
            if name not in OPTIONS and value != getattr(usual, name):
                raise ValueError(
                    f"{name} {value!r} is for noised tokens, and a PLAID model noises embeddings; "
                    f"leave it out, of all options it takes {' and '.join(OPTIONS)}, or use {CAN}"
                )
        return chosen

    def check_known(self, known: Known) -> None:
        if known.is_known.any():
            raise ValueError(
                "a PLAID model samples whole texts and cannot keep known tokens, of a prefix, "
                f"suffix or template; use {CAN} to infill"
            )

    def steps(self, texts: Texts, sampling: Sampling) -> int:
        return sampling.steps

    def start(self, key: jax.Array, rows: Rows, texts: Texts) -> Rows:
        size = (*rows.is_token.shape, self.model.network.embedding_dim)
        latent = self.model.put(np.zeros(size, np.float32))
        chain = gaussian.Chain(rows.chain.tokens, rows.chain.calls, latent, latent)
        return rows._replace(chain=chain)

    def advance(
        self, key: jax.Array, rows: Rows, begin: np.int32, end: np.int32, sampling: Sampling
    ) -> Rows:
        how = {"is_greedy": sampling.greedy, "network": self.model.network}
        chain = reverse_steps(self.model.params, key, rows, begin, end, sampling.steps, **how)
        return rows._replace(chain=chain)

    def noise_levels(self, steps: np.ndarray, sampling: Sampling) -> np.ndarray:
        diffusion = make_score_fn(self.model.network, self.model.params, None)
        variance = gaussian.noise_scale(diffusion.schedule.gamma(1.0 - steps / sampling.steps)) ** 2
        return np.where(steps < sampling.steps, processes.fetch(variance), 0.0)


@functools.partial(jax.jit, static_argnames=("is_greedy", "network"))
def reverse_steps(params, key, rows: Rows, begin, end, steps, *, is_greedy, network):
    """The chain after the steps begin <= i < end from rows.chain; see gaussian.sample."""
    weights = params_in_loop(network, params)
    diffusion = make_score_fn(network, params, None, is_token=rows.is_token)

    def denoise(z, gamma, previous, embeddings):
        inside = make_score_fn(network, weights(), None, is_token=rows.is_token)
        return inside.network(z, gamma, previous, embeddings)

    return gaussian.sample(
        key,
        diffusion._replace(network=denoise),
        rows.is_token.shape,
        steps=steps,
        is_greedy=is_greedy,
        index=rows.index,
        begin=begin,
        end=end,
        chain=rows.chain,
    )
