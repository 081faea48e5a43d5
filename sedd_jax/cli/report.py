"""sedd-report."""

from sedd_jax.cli.arguments import check_matplotlib, check_run, run_parser
from sedd_jax.cli.sample import show


def run(name: str, argv: list[str]) -> None:
    parser = run_parser(
        name, "A run's table, samples, picture.png and summary.json.", "the run's folder"
    )
    parser.add_argument("--template", help='text to infill, "The [MASK:24] statement."')
    parser.add_argument("--passes", type=int, default=16, help="noise levels a block, even")
    parser.add_argument("--began", type=float, help="Unix time that `seconds` counts from")
    options = parser.parse_args(argv)
    from sedd_jax.evaluation.report import report, table
    from sedd_jax.inference.pretrained import load

    check_run(options.workdir, "for its bound give --records to sedd-eval likelihood")
    check_matplotlib(name)
    summary = report(
        load(options.workdir),
        options.workdir,
        template=options.template,
        passes=options.passes,
        began=options.began,
    )
    print(table(summary["heldout"]))
    print(f"\nwords of the samples that occur in the training text: {summary['word_rate']:.0%}")
    print("\nsamples")
    show(summary["samples"][:4])
    if options.template is not None:
        print(f"\n{options.template}")
        show(summary["infill"])
    print(f"\nwritten: {options.workdir / 'summary.json'}, {options.workdir / 'picture.png'}")
