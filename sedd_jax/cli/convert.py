"""sedd-convert: checkpoints to and from the original PyTorch code."""

from typing import Any

from sedd_jax.cli.arguments import (
    add_imports,
    add_tokenizer,
    joined,
    make_parser,
    named_tokenizer,
    path,
)


def run(name: str, argv: list[str]) -> None:
    parser = make_parser(
        name,
        "Checkpoints to and from the original PyTorch code. With --form=workdir, "
        "--config.KEY=VALUE sets a key of the run's config.",
    )
    add = parser.add_argument
    add("--from", dest="source", type=path, required=True, help="hub folder, run, .pth or workdir")
    add("--to", dest="target", type=path, required=True, help="folder to write")
    add("--form", default="hub", help="of what is written: hub, original (a run) or workdir")
    add("--weights", default="ema", help="which of a run's go into a hub folder: ema or raw")
    add("--fresh_optimizer", action="store_true", help="begin AdamW's moments and warm-up again")
    add("--replace", action="store_true", help="an earlier export at --to, with --form=hub")
    add_tokenizer(parser)
    add_imports(parser)
    options, rest = parser.parse_known_args(joined(argv))
    changes = _changes(rest)
    from sedd_jax import convert

    done = convert.convert(
        options.source,
        options.target,
        form=options.form,
        weights=options.weights,
        optimizer=not options.fresh_optimizer,
        tokenizer=named_tokenizer(options),
        changes=changes,
        replace=options.replace,
    )
    rows = (
        ("read", f"{done.read} {options.source}"),
        ("written", f"{done.wrote} {options.target}"),
        ("graph", done.graph),
        ("parameters", f"{done.parameters:,} in {done.tensors} tensors"),
        ("step", "unknown" if done.step is None else f"{done.step:,}"),
        *(("notice", notice) for notice in done.notices),
        ("next", done.next),
    )
    for key, value in rows:
        print(f"{key:<11}{value}")


def _changes(arguments: list[str]) -> dict[str, Any]:
    """{"data.records": "DIR"} of --config.data.records=DIR."""
    from sedd_jax.cli.keys import values_of

    texts = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ValueError(f"unknown argument {argument!r}; sedd-convert --help lists them")
        texts[key] = text
    return values_of(texts)
