"""What a network call of the sampler costs: where weights are cast, and how many kernels it is."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

from sedd_jax import experiment
from sedd_jax.configs import openwebtext_small
from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.samplers import Chain, Known
from sedd_jax.inference.sampling import Rows, Sampling, reverse_steps
from sedd_jax.models.in_loop import cast_weights
from sedd_jax.training.dry_run import parse_target
from sedd_jax.training.dry_run.hlo import parse

MAX_KERNELS = 250  # of a call at batch 1; 231 where this was written, 428 in version 0.1.0
H100 = "h100:1"


def lowered(config, vocab_size, batch_size, mesh):
    """The sampler of a config's network, from shapes alone."""
    made = experiment.make_experiment(config, vocab_size, mesh)
    shape, rows_sharding = (batch_size, config.data.length), made.batch_shape.tokens.sharding

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding)

    rows = Rows(
        index=array(shape[:1], jnp.int32),
        chain=Chain(
            array(shape, jnp.int32), array(shape[:1], jnp.int32), array(shape, jnp.float32)
        ),
        known=Known(array(shape, jnp.int32), array(shape, jnp.bool_)),
        is_token=array(shape, jnp.bool_),
    )
    key = jax.eval_shape(lambda: make_key(0))
    process = {"network": made.network, "graph": made.graph, "schedule": made.schedule}
    span = np.int32(0), np.int32(8)
    traced = reverse_steps.trace(
        made.shape.params, key, rows, *span, Sampling(steps=8).functions(), **process
    )
    return traced.lower(lowering_platforms=("cuda",))


def test_what_is_not_multiplied_in_the_networks_dtype_stays_float32(tiny_config):
    params = experiment.make_experiment(tiny_config, 20, None).shape.params
    cast = jax.eval_shape(lambda params: cast_weights(params, jnp.bfloat16), params)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype != jnp.float32
    }
    kernels = {f"blocks/{name}/kernel" for name in ("qkv", "out", "up", "down")}
    assert names == kernels | {"head_weight"}


def compile_for_h100(folder):
    """The optimized program of SEDD-small's sampler at batch 1, by the CUDA plug-in."""
    target = parse_target(H100)
    if not target.is_installed:
        pytest.skip(f"not installed: {target.packages}")
    file = folder / "program.hlo"
    done = subprocess.run(
        [sys.executable, __file__, str(file)],
        env=os.environ | target.environment | {"PYTHONPATH": _path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return file.read_text()


def _path():
    return os.pathsep.join([str(REPOSITORY / "tests"), *filter(None, sys.path)])


def main(file):
    config = openwebtext_small.get_config()
    config.train.batch_size = 1
    mesh = experiment.make_mesh(config, parse_target(H100).topology().devices)
    text = lowered(config, 50_257, 1, mesh).compile().as_text()
    with open(file, "w", encoding="utf-8") as output:
        output.write(text)


def kernels_of(program, computation):
    """(instruction, runs) of what a computation launches; loops over data run once."""
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
    for one in program.computations[computation]:
        if one.opcode == "while":
            for name in one.called:
                for inner, runs in kernels_of(program, name):
                    yield inner, runs * (program.trip_count(one) or 1)
        elif one.opcode not in free:
            yield one, 1


def test_a_call_on_an_h100_neither_casts_nor_copies_weights_and_has_few_kernels(tmp_path):
    program = parse(compile_for_h100(tmp_path))
    (loop,) = [one for one in program.computations[program.entry] if one.opcode == "while"]
    kernels = list(kernels_of(program, loop.called[0]))
    hidden = {"50258,768", "768,3,12,64", "12,64,768", "768,3072", "3072,768"}
    casts, slices = [], []
    for one, _ in kernels:
        bodies = [program.computations[name] for name in one.called if one.opcode == "fusion"]
        for inner in [one, *(inner for body in bodies for inner in body)]:
            sides = inner.arrays[0].sides if inner.arrays else ()
            sides = ",".join(str(side) for side in sides if side != 1)
            if inner.opcode == "convert" and inner.shape.startswith("bf16"):
                casts.append(sides)
            elif inner.opcode == "slice":
                slices.append(sides)
    assert casts and not hidden & set(casts)
    assert slices and not hidden & set(slices)
    assert sum(runs for _, runs in kernels) <= MAX_KERNELS


if __name__ == "__main__":
    main(sys.argv[1])
