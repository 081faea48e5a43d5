"""The parameters of a network that is called in a loop, as they are read fastest there."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel.sharding import path_name

# Parameters that only matmuls in the network's dtype read.
MATMUL_WEIGHTS = re.compile(r"(^|/)(blocks/(qkv|out|up|down)/kernel|head_weight)$")


def cast_weights(params: Any, dtype: Any) -> Any:
    """params with the weights of the network's matmuls in dtype, in which they are multiplied.

    Before a loop over network calls: inside it they would be read as float32 and cast at each.
    """

    def cast(path, leaf):
        return leaf.astype(dtype) if MATMUL_WEIGHTS.search(path_name(path)) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def params_in_loop(network: Transformer, params: Any) -> Callable[[], Any]:
    """params for network calls in a loop, as they are read fastest: call it inside the loop."""
    if network.placement.platform != "cpu":  # whose loops slice bfloat16 as float32
        params = cast_weights(params, network.dtype)
    if not network.is_unrolled:
        return lambda: params
    cut = cut_blocks(params["blocks"])
    return lambda: params | {"blocks": joined_blocks(cut)}


def cut_blocks(stacks: Any) -> list[Any]:
    """The parameters of each block, cut out of their stacks before a loop, in which each network
    call would copy them out."""
    count = jax.tree.leaves(stacks)[0].shape[0]
    return [jax.tree.map(lambda a, i=i: a[i], stacks) for i in range(count)]


def joined_blocks(cut: list[Any]) -> Any:
    """The stacks again, of which XLA makes no copy where only the blocks are read."""
    return jax.tree.map(lambda *blocks: jnp.stack(blocks), *cut)
