"""How many network calls the bound needs for one standard error, against the paper's protocol.

    python benchmarks/likelihood_variance.py --workdir=runs/mine --blocks=64 --repeats=32

The paper's protocol averages the training loss at independent uniform times. Both estimators are
run on the same blocks of the run's held-out split, again and again with other noise, and their
variances are taken from the spread of the repeats, not from the errors that they report. The
factor is that of the calls which the paper's protocol needs for the same variance: calls of the
bound's reconstruction term, which the protocol does not have, are counted against the bound.

`a sequence` is the mean over blocks of the variance of each; `the corpus` is the variance of the
sum over all of them, where the even spread of noise levels over blocks counts too. `claimed` is
the variance that the bound reports over the one measured for a sequence.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import numpy as np
from tqdm.auto import tqdm

from sedd_jax import data
from sedd_jax.diffusion.likelihood import bound
from sedd_jax.diffusion.losses import dwdse
from sedd_jax.inference.pretrained import load
from sedd_jax.models.head import make_score_fn
from sedd_jax.runs.workdir import open_records, open_workdir


def variances(values: np.ndarray) -> dict[str, float]:
    """Over repeats, of values [repeats, blocks]: the blocks' mean, and that of their sum."""
    return {
        "a sequence": values.var(axis=0, ddof=1).mean(),
        "the corpus": values.sum(axis=1).var(ddof=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--passes", default="2,8,16,32", help="even numbers, commas between")
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load(options.workdir)
    config = open_workdir(options.workdir).config
    records = open_records(config, options.workdir)
    blocks = data.read_blocks(records, config.data.heldout_split, options.blocks)
    count = len(blocks.tokens) // options.batch_size * options.batch_size

    def fixed(params, blocks):
        """The arguments that both estimators end with."""
        score_fn = make_score_fn(model.network, params, model.graph, is_token=blocks.is_token)
        return score_fn, model.graph, model.schedule

    @jax.jit
    def protocol(params, key, blocks, index):
        key = jax.random.fold_in(key, index[0])
        options = {"t_min": model.t_min, "is_token": blocks.is_token}
        return dwdse(key, blocks.tokens, *fixed(params, blocks), **options)

    @functools.partial(jax.jit, static_argnames="passes")
    def ours(params, key, blocks, index, *, passes):
        options = {"t_min": model.t_min, "is_token": blocks.is_token, "passes": passes}
        return bound(key, blocks.tokens, index, *fixed(params, blocks), **options)

    def repeated(estimate, repeats, seed):
        """The estimates of every block, a repeat a row: a tree of [repeats, count]."""
        rows = []
        for repeat in tqdm(range(repeats), leave=False):
            key = jax.random.fold_in(jax.random.key(seed), repeat)
            parts = []
            for start in range(0, count, options.batch_size):
                index = np.arange(start, start + options.batch_size)
                batch = jax.tree.map(lambda a, index=index: a[index], blocks)
                parts.append(jax.device_get(estimate(model.params, key, batch, index)))
            rows.append(jax.tree.map(lambda *a: np.concatenate(a), *parts))
        return jax.tree.map(lambda *a: np.stack(a).astype(np.float64), *rows)

    # As many calls as the largest of the others, so that both are known equally well.
    numbers = [int(passes) for passes in options.passes.split(",")]
    independent = repeated(protocol, options.repeats * max(numbers), seed=0)
    one_call = variances(independent)
    tokens = blocks.count / len(blocks.tokens)
    spread = one_call["a sequence"] ** 0.5 / tokens
    print(
        f"{count} blocks of {tokens:.0f} tokens; the paper's protocol: "
        f"{independent.mean() / tokens:.4f} nats/token, {spread:.3f} standard deviation of one call"
    )
    heads = ("calls", "nats/token", "a sequence", "the corpus", "claimed")
    print("".join(f"{head:>13}" for head in ("passes", *heads)))
    rows = []
    for passes in numbers:
        bounds = repeated(
            lambda *a, passes=passes: ours(*a, passes=passes), options.repeats, seed=1
        )
        value = bounds.diffusion + bounds.reconstruction
        calls = passes + 2
        measured = variances(value)
        row = {
            "passes": passes,
            "calls": calls,
            # of the diffusion part alone, to compare with the protocol's
            "nats_per_token": bounds.diffusion.mean() / tokens / (1.0 - model.t_min),
            **{scope: one_call[scope] / (calls * measured[scope]) for scope in measured},
            "claimed": bounds.variance.mean() / measured["a sequence"],
        }
        rows.append(row)
        factors = f"{row['a sequence']:>12.1f}x{row['the corpus']:>12.1f}x"
        print(
            f"{passes:>13}{calls:>13}{row['nats_per_token']:>13.4f}{factors}{row['claimed']:>13.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
