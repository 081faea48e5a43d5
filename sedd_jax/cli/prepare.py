"""sedd-prepare: make records of a corpus, blocks of tokens, for the others."""

import argparse

from sedd_jax.cli.arguments import add_imports, make_parser, name_or_path, path


def run(name: str, argv: list[str]) -> None:
    from sedd_jax import data

    options = _parsed(name, argv)
    records = data.make_records(
        options.dataset,
        options.out,
        path=options.manual_dir,
        heldout_fraction=options.heldout_fraction,
        data_dir=options.data_dir,
        documents=options.documents,
        detokenizer=options.detokenizer,
        tokenizer=options.tokenizer,
        tokenizer_path=options.tokenizer_path,
        length=options.length,
        form=options.form,
        workers=options.workers,
        progress=True,
    )
    print(data.describe(records))


def _parsed(name: str, argv: list[str]) -> argparse.Namespace:
    from sedd_jax import data
    from sedd_jax.data.published import HELDOUT_FRACTION

    parser = make_parser(name, "A corpus as records: fixed-length blocks of tokens, made once.")
    add = parser.add_argument
    add("--dataset", required=True, help=f"{data.KNOWN_CORPORA}, or one of --imports")
    add(
        "--out",
        type=path,
        required=True,
        help="folder of the records; one that has these already is left as it is",
    )
    add(
        "--tokenizer",
        type=name_or_path,
        default="gpt2",
        help=f"{', '.join(data.TOKENIZERS)}, or a tokenizer.json (a run's, or any)",
    )
    add(
        "--tokenizer_path",
        type=name_or_path,
        default="",
        help="folder, tokenizer.json or hub id@commit (gpt2, bert, json; default: the published "
        "GPT-2 or BERT); "
        ".model file or train:SIZE (sentencepiece)",
    )
    add("--length", type=int, default=1024, help="tokens in a block")
    add("--form", default="packed", help="packed, or padded: a document a block")
    add(
        "--manual_dir",
        type=name_or_path,
        default="",
        help="folder with the corpus's archive or files (default: download); your own text",
    )
    add(
        "--data_dir",
        type=name_or_path,
        default="",
        help="where archives are downloaded to and TFDS keeps datasets (default: TFDS_DATA_DIR)",
    )
    add("--documents", default="", help="lines or whole, for the corpora that are cut into lines")
    add("--detokenizer", default="published", help="published, none, or one by name")
    add(
        "--heldout_fraction",
        type=float,
        help="of the documents, for corpora without a split of their own (default: 0.1; of "
        f"openwebtext {HELDOUT_FRACTION}); 1: all of your own text, to score it",
    )
    add_imports(parser)
    add("--workers", type=int, default=1, help="threads that encode; the result is the same")
    return parser.parse_args(argv)
