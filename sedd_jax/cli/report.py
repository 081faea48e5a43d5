"""sedd-report: write a run's table, samples and picture."""

from sedd_jax.cli.arguments import (
    add_imports,
    check_matplotlib,
    check_run,
    make_parser,
    path,
    run_records,
)
from sedd_jax.cli.compiled import add_compilation_cache, keep_compiled_programs
from sedd_jax.cli.sample import show
from sedd_jax.host.console import activity


def run(name: str, argv: list[str]) -> None:
    parser = make_parser(name, "A run's table, samples, picture.png and summary.json.")
    parser.add_argument("--workdir", type=path, required=True, help="the run's folder")
    add_imports(parser)
    parser.add_argument("--template", help='text to infill, "The [MASK:24] statement."')
    parser.add_argument("--passes", type=int, default=16, help="noise levels a block, even")
    parser.add_argument("--began", type=float, help="Unix time that `seconds` counts from")
    add_compilation_cache(parser)
    options = parser.parse_args(argv)
    from sedd_jax.evaluation.likelihood import likelihood_table
    from sedd_jax.evaluation.report import make_report, write_report
    from sedd_jax.inference.pretrained import load
    from sedd_jax.runs.workdir import PICTURE, SUMMARY

    workdir = options.workdir
    check_run(workdir, "for its bound give --records to sedd-eval likelihood")
    check_matplotlib(name)
    keep_compiled_programs(options.compilation_cache)
    model = load(workdir)
    records, names = run_records(workdir)
    summary, frames = make_report(
        model,
        records,
        train_split=names.train_split,
        heldout_split=names.heldout_split,
        template=options.template,
        passes=options.passes,
        began=options.began,
    )
    print(likelihood_table(summary["heldout"]))
    print(f"\nwords of the samples that occur in the training text: {summary['word_rate']:.0%}")
    print("\nsamples")
    show(summary["samples"][:4])
    if options.template is not None:
        print(f"\n{options.template}")
        show(summary["infill"])
    try:  # last: what the work has given is shown by now
        with activity("drawing"):
            write_report(workdir, summary, frames)
    except OSError as error:
        raise ValueError(
            f"cannot write {SUMMARY} and {PICTURE} in {str(workdir)!r}: {error.strerror}; make the "
            "folder writable, or run it on a copy"
        ) from error
    print(f"\nwritten: {workdir / SUMMARY}\nwritten: {workdir / PICTURE}")
