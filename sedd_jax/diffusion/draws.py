"""The keys of a run's noise, and exact draws from a categorical distribution. Imports jax only."""

import jax
import jax.numpy as jnp

# Tokens of a group. A draw makes noise for V / GROUP groups and for GROUP tokens of one of them.
GROUP = 256

# Settings of jax that would change a seed's noise or the dtypes, or that the code (or flax's) does
# not run under, with the values that it runs under: the first is jax's default.
SETTINGS = {
    "jax_threefry_partitionable": (True,),
    "jax_random_seed_offset": (0,),
    "jax_enable_x64": (False,),
    "jax_numpy_rank_promotion": ("allow", "warn"),
    "jax_numpy_dtype_promotion": ("standard",),
    "jax_transfer_guard": (None, "allow", "log", "log_explicit"),
}


def check_settings() -> None:
    """ValueError for a setting of jax, from the environment or a program, that is not allowed."""
    for name, allowed in SETTINGS.items():
        value = getattr(jax.config, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name.upper()} is {getattr(value, 'value', value)!r}, under which a seed would "
                "give other noise or the model would not run as it was made; unset it in the "
                f"environment, or call jax.config.update({name!r}, {allowed[0]!r})"
            )


def make_key(seed: int) -> jax.Array:
    """The key of a seed: threefry's, whatever generator JAX_DEFAULT_PRNG_IMPL names.

    On every device and after every resumption a seed gives the same noise; the only function that
    turns a seed into a key. ValueError as `check_settings`.
    """
    check_settings()
    return jax.random.key(seed, impl="threefry2x32")


def categorical(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """A token in proportion to exp(log_weights [..., V]), int32 [...].

    -1 where they are not a distribution: one is NaN or +inf, or all are -inf.
    The distribution is that of noise over all V tokens, but for a large V first a group of tokens
    is drawn, in proportion to its sum, and then a token of it: noise costs more than the sum.
    """

    def draw(key, log_weights):
        # mode="high": with 23-bit noise a token of probability 1e-7 beside a dominant "stay" is
        # drawn at half its rate.
        return jax.random.categorical(key, log_weights, mode="high").astype(jnp.int32)

    def where_finite(log_weights, drawn):
        return jnp.where(jnp.isfinite(log_weights.max(axis=-1)), drawn, -1)

    *rows, vocab = log_weights.shape
    if vocab <= 2 * GROUP:
        return where_finite(log_weights, draw(key, log_weights))
    key_group, key_token = jax.random.split(key)
    padding = [(0, 0)] * len(rows) + [(0, -vocab % GROUP)]
    groups = jnp.pad(log_weights, padding, constant_values=-jnp.inf)
    groups = jax.nn.logsumexp(groups.reshape(*rows, -1, GROUP), axis=-1)
    begin = GROUP * draw(key_group, groups)
    # Slices of one size: a last group that is not full begins with tokens of the one before.
    start = jnp.minimum(begin, vocab - GROUP)
    cut = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, GROUP))
    members = cut(log_weights.reshape(-1, vocab), start.reshape(-1)).reshape(*rows, GROUP)
    is_member = jnp.arange(GROUP) >= (begin - start)[..., None]
    drawn = start + draw(key_token, jnp.where(is_member, members, -jnp.inf))
    return where_finite(groups, drawn)
