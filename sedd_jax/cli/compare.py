"""sedd-compare: train several methods alike and compare them."""

import argparse
import difflib
import re
import sys
from typing import Any

from sedd_jax.cli.arguments import check_matplotlib, joined, make_parser, name_or_path, path
from sedd_jax.cli.train import parse_train
from sedd_jax.configs.rivals import RIVALS

METHODS = "sedd_absorbing,sedd_uniform,normalised,d3pm_absorb,ar,csm"
FAILED = 3  # the status when a method could not be trained, scored or sampled


def run(name: str, argv: list[str]) -> int:
    options, keys = _parsed(name, argv)
    from sedd_jax.evaluation import comparison, comparison_table
    from sedd_jax.host.files import write_json
    from sedd_jax.runs.workdir import in_use, prepare_data

    out = options.out.absolute()
    base, runs = _runs(name, options, keys)
    scoring = comparison.Scoring(
        **{field: getattr(options, field) for field in comparison.Scoring._fields}
    )
    rivals = {run.method: RIVALS[run.method] for run in runs}
    settings: dict[str, Any] = {"config": base.to_dict(), "rivals": rivals, **scoring._asdict()}
    comparison.check_settings(out, settings)
    try:
        with in_use(out):
            settings = comparison.check_settings(out, settings)  # again: see in_use
            prepare_data(base, out)
            write_json(out / comparison.SETTINGS, settings)
            comparison.compare(
                runs,
                scoring,
                baselines=base.data.form == "packed",
                after_part=lambda: comparison_table.write_files(out, runs, settings),
            )
            files = comparison_table.write_files(out, runs, settings)
            if options.picture:
                files.append(out / f"{comparison_table.FILE}.png")
                comparison_table.draw_picture(files[-1], runs)
    except comparison.Stopped as stop:
        print(f"{name}: {stop}", file=sys.stderr)
        return 128 + stop.number
    print(comparison_table.terminal(runs))
    print("\nwritten:", *map(str, files), sep="\n  ")
    return FAILED if any(run.read(comparison.FAILURE) for run in runs) else 0


def _parsed(name: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of them that set a key of the config."""
    parser = make_parser(
        name,
        "Methods trained on the same batches for the same tokens, scored on the same text and "
        "sampled: a table and a picture in --out. --config.KEY=VALUE as for sedd-train.",
    )
    add = parser.add_argument
    add("--config", required=True, help="a config, as for sedd-train, which each method changes")
    add("--out", type=path, required=True, help="a new folder, or a comparison to go on with")
    add("--methods", default=METHODS, help=f"of sedd_jax.configs.rivals (default: {METHODS})")
    add("--seeds", type=int, default=1, help="runs of each method, from config.seed on")
    add("--passes", type=int, default=16, help="noise levels a block of the bound, even")
    add("--blocks", type=int, help="held-out blocks that are scored (default: all)")
    add("--num_samples", type=int, default=64, help="samples of each run")
    add(
        "--scorer",
        type=name_or_path,
        help="also the generative perplexity under this GPT-2 (gpt2-large, a folder, a hub id) or "
        "under ngram:N, the N-grams of the training text",
    )
    add("--no_picture", dest="picture", action="store_false", help="draw none: without matplotlib")
    options, rest = parser.parse_known_args(joined(argv))
    for argument in rest:
        if not re.match(r"--?config\.", argument):
            parser.error(f"unknown argument {argument!r}")
    if options.picture:
        check_matplotlib(f"{name} without --no_picture")
    return options, rest


def _runs(name: str, options: argparse.Namespace, keys: list[str]) -> tuple[Any, list[Any]]:
    """The config that methods change, and every run, seed by seed; ValueError for what no run can
    be."""
    from sedd_jax.diffusion.likelihood import check_passes
    from sedd_jax.evaluation.comparison import Run
    from sedd_jax.evaluation.generations import check_length
    from sedd_jax.inference.sampling import check_whole
    from sedd_jax.runs.workdir import RECORDS

    out, shared = options.out.absolute(), [f"--config={options.config}", *keys]
    if not {*options.methods.split(",")} <= {*RIVALS}:  # a module of config.imports may add one
        parse_train(name, [*shared, f"--workdir={out}"])
    methods = _methods(options.methods)
    for flag in ("seeds", "num_samples", "blocks"):
        if (value := getattr(options, flag)) is not None:
            check_whole(f"--{flag}", value, 1)
    check_passes(options.passes, "--passes")
    changed = set().union(*(RIVALS[method] for method in methods))
    for argument in keys:
        key = argument.lstrip("-").removeprefix("config.").partition("=")[0]
        if key in changed:
            raise ValueError(f"config.{key} is what the methods differ in; leave {argument} out")
    base = parse_train(name, [*shared, f"--workdir={out}"]).config
    check_length(base.data.length)
    runs = []
    for seed in range(base.seed, base.seed + options.seeds):
        for method in methods:
            values = {**RIVALS[method], "seed": seed}
            values |= {"data.records": base.data.records or str(out / RECORDS)}
            arguments = [*shared, *(f"--config.{key}={value}" for key, value in values.items())]
            config = parse_train(name, [*arguments, f"--workdir={out}"]).config
            runs.append(Run(method, config, arguments, out))
    return base, runs


def _methods(text: str) -> list[str]:
    """The names between commas, each once; ValueError for one that is not known."""
    methods = list(dict.fromkeys(text.split(",")))
    for method in methods:
        if method not in RIVALS:
            near = difflib.get_close_matches(method, RIVALS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown method {method!r}; {hint}known: {', '.join(RIVALS)}")
    return methods
