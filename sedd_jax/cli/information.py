"""sedd-eval information."""

import argparse

from sedd_jax.cli.arguments import (
    MODEL,
    NEEDS_RECORDS,
    add_json,
    add_records,
    add_sampling,
    add_step,
    add_steps,
    add_tokenizer,
    add_workdir,
    check_run,
    chosen_records,
    name_or_path,
    named_tokenizer,
    sampling_of,
    show_result,
)


def run(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Entropy, KL divergence from another model and mutual information, with their errors."""
    add = parser.add_argument
    add_workdir(parser, MODEL)
    add_step(parser)
    add_tokenizer(parser)
    add("--against", type=name_or_path, help="the other model of a divergence, as --workdir")
    add("--first", type=int, help="the mutual information of so many first tokens and the others")
    add_records(parser)
    add("--blocks", type=int, default=256, help="the first so many blocks of the split")
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
    from sedd_jax.inference.pretrained import load

    model = load(options.workdir, step=options.step, tokenizer=named_tokenizer(options))
    against = None if options.against is None else load(options.against)
    information.check(model, against, options.first, options.passes)
    how = {"batch_size": options.batch_size, "seed": options.seed, "progress": True}
    if options.num_samples is not None:
        tokens = model.sample_tokens(options.num_samples, **sampling_of(options, "steps"), **how)
        source, blocks = "samples of the model", data.Blocks(tokens)
    else:
        records, split = chosen_records(options)
        likelihood.check_records(model, records)
        source = f"{records.fingerprint['source']['corpus']} {split}"
        blocks = data.read_blocks(records, split, options.blocks)
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
    elif options.records is not None or options.split is not None:
        raise ValueError("--records and --num_samples are both there; leave one out")
    from sedd_jax.inference.sampling import Sampling

    Sampling().replaced(**{name: chosen[name] for name in chosen if name != "steps"})
