"""sedd-eval information."""

import argparse

from sedd_jax.cli.arguments import (
    NEEDS_RECORDS,
    add_json,
    add_model,
    add_records,
    add_sampling,
    add_steps,
    check_run,
    check_sampling,
    chosen_records,
    name_or_path,
    sampling_of,
    show_result,
)
from sedd_jax.cli.cluster import load_model, load_over_all

BLOCKS = 256  # of a split that are measured


def run(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Entropy, KL divergence from another model and mutual information, with their errors."""
    add = parser.add_argument
    add_model(parser)
    add("--against", type=name_or_path, help="the other model of a divergence, as --workdir")
    add("--first", type=int, help="the mutual information of so many first tokens and the others")
    add_records(parser)
    add("--blocks", type=int, help=f"the first so many blocks of the split (default: {BLOCKS})")
    add("--num_samples", type=int, help="take so many samples of the model in place of records")
    add_steps(parser)
    add_sampling(parser)
    add("--passes", type=int, default=16, help="noise levels a text, even")
    add("--batch_size", type=int, default=4, help="texts at once: each needs tables of its scores")
    add("--seed", type=int, default=0, help="of the noise and the samples")
    add_json(parser)
    options = parser.parse_args(argv)
    _check(options)
    from sedd_jax import data
    from sedd_jax.evaluation import information, likelihood

    model = load_model(options)
    against = None if options.against is None else load_over_all(options.against)
    information.check(model, against, options.first, options.passes)
    how = {"batch_size": options.batch_size, "seed": options.seed, "progress": True}
    if options.num_samples is not None:
        tokens = model.sample_tokens(options.num_samples, **sampling_of(options, "steps"), **how)
        source, blocks = "samples of the model", data.Blocks(tokens)
    else:
        records, split = chosen_records(options)
        likelihood.check_records(model, records)
        source = f"{records.fingerprint['source']['corpus']} {split}"
        blocks = data.read_blocks(
            records, split, BLOCKS if options.blocks is None else options.blocks
        )
    result = information.information_measures(
        model, blocks, against=against, first=options.first, passes=options.passes, **how
    )
    result = {"source": source, "against": options.against, **result}
    show_result(information.describe(result), result, options.json)


def _check(options: argparse.Namespace) -> None:
    """ValueError, before a model is loaded, for options that go together with no others."""
    chosen = sampling_of(options, "steps")
    if options.num_samples is None:
        if chosen:
            raise ValueError(f"--{next(iter(chosen))} is for --num_samples; leave it out")
        if options.records is None:
            check_run(options.workdir, f"{NEEDS_RECORDS}, or --num_samples")
    for name in ("records", "split", "blocks"):
        if options.num_samples is not None and getattr(options, name) is not None:
            raise ValueError(f"--{name} and --num_samples are both there; leave one out")
    check_sampling(options)
