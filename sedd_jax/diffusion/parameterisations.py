"""Between the absorbing score and the conditional law of a masked token. Imports jax only.

MDLM (Sahoo et al. 2024), MD4 (Shi et al. 2024) and RADD (Ou et al. 2024) learn
p(x0_l = y | unmasked tokens); SEDD learns the ratio p_sigma(y at l) / p_sigma(MASK at l), its
"concrete score". At a masked position the two differ by a factor that depends on sigma alone
(Ou et al. 2024, arXiv 2406.03736, theorem 1): the odds exp(-sigma) / (1 - exp(-sigma)) that a
token is still unmasked, which are 1 / expm1(sigma).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.scores import DenseScores, ScoreFn, Sigma, Tokens

ConditionalFn = Callable[[Tokens, Sigma], jax.Array]  # -> log p, float32 [B, L, V]


def log_score_from_conditional(log_p: jax.Array, sigma: Sigma) -> jax.Array:
    """Log-scores over the clean tokens at masked positions, float32 [B, L, V].

    log_p [B, L, V] is log p(x0_l = y | unmasked tokens); sigma is [B, 1], above 0.
    """
    log_odds = -jnp.log(jnp.expm1(sigma.astype(jnp.float32)))  # of being unmasked
    return log_p.astype(jnp.float32) + log_odds[..., None]


def conditional_from_log_score(log_score: jax.Array) -> jax.Array:
    """log p(x0_l = y | unmasked tokens) at masked positions, float32 [B, L, V].

    log_score [B, L, V] is over the clean tokens, without MASK. The inverse of
    `log_score_from_conditional` where the scores sum to the true 1 / expm1(sigma). A network's
    may not: their sum, and with it how soon a token is to be unmasked, is then lost, and the bound
    of the result is the normalised one.
    """
    return jax.nn.log_softmax(log_score.astype(jnp.float32), axis=-1)


def score_fn_from_conditional(conditional_fn: ConditionalFn, graph: Graph) -> ScoreFn:
    """A model of the conditional law as a score function for losses, samplers and the bound.

    conditional_fn maps tokens int32 [B, L], MASK at vocab_size, and sigma [B, 1] to log p, float32
    [B, L, V]; what it says at unmasked positions is not used, and the log-scores there are 0: the
    absorbing graph asks for none. ValueError if the graph has no MASK.
    """
    mask = getattr(graph, "mask", None)
    if mask is None:
        raise ValueError(
            f"a graph of type {type(graph).__name__} has no MASK, and the conditional law of a "
            "masked token gives no score; use the absorbing graph"
        )

    def score_fn(xt: Tokens, sigma: Sigma) -> DenseScores:
        clean = log_score_from_conditional(conditional_fn(xt, sigma), sigma)
        clean = jnp.where((xt == mask)[..., None], clean, 0.0)
        table = jnp.pad(clean, [(0, 0), (0, 0), (0, 1)])
        return DenseScores(table, xt, graph.vocab_size)

    return score_fn
