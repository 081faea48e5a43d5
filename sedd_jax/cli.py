"""The commands: sedd-prepare, sedd-train, sedd-eval, sedd-sample, sedd-report and sedd-convert.

Each is also `python -m sedd_jax train` and so on. What a user can cause ends in one line on
standard error and exit status 2; training that cannot go on ends in one line and status 3.
"""

import argparse
import difflib
import importlib.util
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

Argv = list[str] | None


def train_command(argv: Argv = None) -> int:
    """sedd-train --config=configs/quickstart.py --workdir=DIR [--config.train.steps=100 ...]

    To go on with the run in DIR, its own config is enough: sedd-train --workdir=DIR.
    """
    return _guarded("sedd-train", _train, argv)


def prepare_command(argv: Argv = None) -> int:
    """sedd-prepare --dataset=wikitext2 --tokenizer=gpt2 --length=1024 --out=DIR: records."""
    return _guarded("sedd-prepare", _prepare, argv)


def eval_command(argv: Argv = None) -> int:
    """sedd-eval likelihood|generative_perplexity|mauve|pareto --workdir=DIR ..."""
    return _guarded("sedd-eval", _eval, argv)


def sample_command(argv: Argv = None) -> int:
    """sedd-sample --workdir=DIR [--template "... [MASK:20] ..."]: text from a run."""
    return _guarded("sedd-sample", _sample, argv)


def report_command(argv: Argv = None) -> int:
    """sedd-report --workdir=DIR: table, samples, picture.png and summary.json of a run."""
    return _guarded("sedd-report", _report, argv)


def convert_command(argv: Argv = None) -> int:
    """sedd-convert --from=SOURCE --to=TARGET [--form=hub|original|workdir]: checkpoints."""
    return _guarded("sedd-convert", _convert, argv)


USAGE = """Every key is in configs/base.py.

Compile for a machine without having it, and see what fits:
  --dry_run --target=v5e:4x4   or v4:4x4x4, v5p:4x8x8, v5e:16x16*2 (slices), a100:16, h100:8, cpu:8
  --vocab_size=N               where the tokenizer's is not known from its name

On several machines, the same command on each; SLURM (in srun) and TPU pods are recognised:
  --coordinator=HOST:PORT --process_count=N --process_index=I   elsewhere
  --coordinator_bind=ADDRESS:PORT   where process 0 listens; default: on all its addresses
  --join_timeout=60            seconds until a missing process is an error
  --heartbeat=100              seconds until a dead process ends the others

Exit status: 0 all steps are done; 2 a mistake to mend; 3 training cannot go on; else run it again.
  --requeue_status=75          the status when a signal stopped it, after a checkpoint; default 0"""

COMMANDS = {
    "prepare": prepare_command,
    "train": train_command,
    "eval": eval_command,
    "sample": sample_command,
    "report": report_command,
    "convert": convert_command,
}


def main(argv: Argv = None) -> int:
    """python -m sedd_jax COMMAND ..."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        given = argv[0] if argv else ""
        print(f"sedd_jax: unknown command {given!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:])


def _guarded(name: str, command: Callable[[str, list[str]], int | None], argv: Argv) -> int:
    _log_plainly()
    try:
        return command(name, sys.argv[1:] if argv is None else argv) or 0
    except (ValueError, OSError, flags.Error) as error:
        return _say(name, error, status=2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _say(name: str, error: Exception, status: int) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


class _ToStandardError(logging.StreamHandler):
    """Writes to what sys.stderr is when the message comes: a notebook or a test may replace it."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


def _log_plainly() -> None:
    """The package's own messages as plain lines on standard error."""
    logger = logging.getLogger("sedd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


class Request(NamedTuple):
    """What sedd-train was asked for."""

    config: ConfigDict
    workdir: Path | None
    job: Any  # processes.Job
    requeue_status: int
    target: str | None  # of a dry run; None: no dry run
    vocab_size: int | None


def parse_train(name: str, argv: list[str]) -> Request:
    """--config=FILE[:ARGUMENT], --config.key=value, --workdir=DIR and the flags of `USAGE`."""
    from sedd_jax.config import RULES
    from sedd_jax.processes import Job

    argv = [_find_config(argument) for argument in argv]
    for argument in argv:
        if argument.startswith("--config."):
            key = argument[len("--config.") :].split("=")[0]
            if key not in RULES:
                near = difflib.get_close_matches(key, RULES, n=3) or list(RULES)
                raise ValueError(f"unknown config key {key}; did you mean {', '.join(near)}?")
    values = flags.FlagValues()
    about = {"flag_values": values, "sys_argv": [name, *argv]}
    saved = _saved_config(argv)
    if saved is None:
        config_flags.DEFINE_config_file("config", None, "the experiment", **about)
    else:
        config_flags.DEFINE_config_dict("config", saved, **about)
    for flag in ("workdir", "target", "coordinator", "coordinator_bind"):
        flags.DEFINE_string(flag, None, "", flag_values=values)
    for flag in ("vocab_size", "process_count", "process_index"):
        flags.DEFINE_integer(flag, None, "", flag_values=values)
    for flag in ("join_timeout", "heartbeat"):
        flags.DEFINE_integer(flag, Job._field_defaults[flag], "", flag_values=values)
    flags.DEFINE_integer("requeue_status", 0, "", 0, 255, flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "", flag_values=values)
    rest = values([name, *argv])[1:]
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; write --config.key=value")
    dry_run, target = values.dry_run, values.target
    if dry_run != (target is not None):
        raise ValueError(
            "--dry_run and --target go together; for example --dry_run --target=v5e:4x4"
        )
    for flag in ("config",) if dry_run else ("config", "workdir"):
        if values[flag].value is None or values[flag].value == "":
            raise ValueError(
                f"--{flag} is missing; for example {name} --config=configs/quickstart.py "
                "--workdir=runs/quickstart"
            )
    return Request(
        config=values.config,
        workdir=None if values.workdir is None else Path(values.workdir),
        job=Job(**{field: values[field].value for field in Job._fields}),
        requeue_status=values.requeue_status,
        target=target,
        vocab_size=values.vocab_size,
    )


def _saved_config(argv: list[str]) -> ConfigDict | None:
    """The config of the run in --workdir, if there is one and --config names no other."""
    from sedd_jax.config import from_json

    arguments = [argument.lstrip("-").split("=", 1) for argument in argv]
    workdirs = [rest[0] for name, *rest in arguments if name == "workdir" and rest]
    if not workdirs or any(name == "config" for name, *_ in arguments):
        return None
    file = Path(workdirs[-1]) / "config.json"
    return from_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def _find_config(argument: str) -> str:
    """--config=quickstart names a config that is installed with the package."""
    if not argument.startswith("--config="):
        return argument
    path, colon, rest = argument[len("--config=") :].partition(":")
    if Path(path).is_file():
        return argument
    shipped = resources.files("sedd_jax.configs") / f"{path}.py"
    if shipped.is_file():
        return f"--config={shipped}{colon}{rest}"
    known = sorted(
        Path(file.name).stem
        for file in resources.files("sedd_jax.configs").iterdir()
        if file.name.endswith(".py") and not file.name.startswith("_")
    )
    raise ValueError(f"no config file {path!r}; give a path, or one of {', '.join(known)}")


def _train(name: str, argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(f"usage: {train_command.__doc__}\n{USAGE}")
        return 0
    request = parse_train(name, argv)
    if request.target is not None:
        return _dry_run(name, request)
    from sedd_jax import processes

    processes.join(request.job)
    try:
        return _train_here(name, request)
    except Exception as error:
        if processes.is_alone() or isinstance(error, ValueError):  # which all processes raise
            raise
        # The others wait for this one in a collective: it must be gone for them to notice.
        traceback.print_exc()
        _say(name, error, status=1)
        sys.stderr.flush()
        os._exit(1)


def _train_here(name: str, request: Request) -> int:
    from sedd_jax import processes
    from sedd_jax.progress import TrainingStopped
    from sedd_jax.train import train

    if not processes.is_first():  # one writes what all would
        logging.getLogger("sedd_jax").setLevel(logging.WARNING)
    try:
        step = train(request.config, request.workdir)
    except TrainingStopped as error:
        return _say(name, error, status=3)
    return 0 if step >= request.config.train.steps else request.requeue_status


def _dry_run(name: str, request: Request) -> int:
    from sedd_jax.dry_run import describe, dry_run

    estimate = dry_run(request.config, request.target, vocab_size=request.vocab_size)
    print(describe(estimate))
    return _say(name, ValueError(estimate.complaint), status=2) if estimate.complaint else 0


class _Parser(argparse.ArgumentParser):
    """Mistakes in the arguments are errors like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=name, description=description, allow_abbrev=False)


MODEL = "the run's folder, an exported one, or a hub id, as louaaron/sedd-small"
WITH_RECORDS = "(the last two need --records)"
NEEDS_RECORDS = "give --records, a folder made by sedd-prepare"


def _run_parser(name: str, description: str, workdir: str) -> argparse.ArgumentParser:
    parser = _parser(name, description)
    parser.add_argument("--workdir", type=Path, required=True, help=workdir)
    return parser


def _check_run(source: Path, remedy: str) -> None:
    """ValueError for a model alone where the command needs its run; what is no model, load refuses."""
    from sedd_jax.convert.folder import PICKLED, WEIGHTS
    from sedd_jax.data import hub

    if any((source / name).is_file() for name in (WEIGHTS, PICKLED)):
        found = f"{str(source)!r} is an exported model, which has no records of its own"
    elif not source.exists() and hub.parse(str(source)) is not None:
        found = f"no folder at {str(source)!r}, and a model of the hub has no records of its own"
    else:
        return
    raise ValueError(f"{found}; {remedy}, or the folder of a run as --workdir")


def _prepare(name: str, argv: list[str]) -> None:
    from sedd_jax import data
    from sedd_jax.data.published import HELDOUT_FRACTION

    parser = _parser(name, "A corpus as records: fixed-length blocks of tokens, made once.")
    add = parser.add_argument
    add("--dataset", required=True, help=", ".join(data.CORPORA))
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the records; one that has these already is left as it is",
    )
    add(
        "--tokenizer",
        default="gpt2",
        help=f"{', '.join(data.TOKENIZERS)}, or the tokenizer.json of a run",
    )
    add(
        "--tokenizer_path",
        default="",
        help="folder, tokenizer.json or hub id@commit (gpt2, bert; default: the published one); "
        ".model file or train:SIZE (sentencepiece)",
    )
    add("--length", type=int, default=1024, help="tokens in a block")
    add("--form", default="packed", help="packed, or padded: a document a block")
    add(
        "--manual_dir",
        default="",
        help="folder with the corpus's archive or files (default: download); your own text",
    )
    add("--data_dir", default="", help="where the documents are kept; TFDS_DATA_DIR by default")
    add("--documents", default="", help="lines or whole, for the corpora that are cut into lines")
    add("--detokenizer", default="published", help="published, none, or one by name")
    add(
        "--heldout_fraction",
        type=float,
        help="of the documents, for corpora without a split of their own (default: 0.1; of "
        f"openwebtext {HELDOUT_FRACTION})",
    )
    add("--workers", type=int, default=1, help="processes that encode; the result is the same")
    options = parser.parse_args(argv)
    records = data.make_records(
        options.dataset,
        options.out,
        path=options.manual_dir,
        tokenizer=options.tokenizer,
        tokenizer_path=options.tokenizer_path,
        length=options.length,
        form=options.form,
        heldout_fraction=options.heldout_fraction,
        documents=options.documents,
        detokenizer=options.detokenizer,
        data_dir=options.data_dir,
        workers=options.workers,
        progress=True,
    )
    print(data.describe(records))


EVALUATIONS = {
    "likelihood": "An upper bound on -log p of a split, in every unit.",
    "generative_perplexity": "Perplexity of the model's samples under GPT-2, with their entropy.",
    "mauve": "MAUVE of completions of 100-token texts, 50 tokens given.",
    "pareto": "Generative perplexity against network calls: table and picture.",
}


def _eval(name: str, argv: list[str]) -> None:
    kinds = {
        "likelihood": _likelihood,
        "generative_perplexity": _generative_perplexity,
        "mauve": _mauve,
        "pareto": _pareto,
    }
    if argv and argv[0] in kinds:
        kinds[argv[0]](f"{name} {argv[0]}", argv[1:])
    elif {"-h", "--help"} & set(argv[:1]):
        print(f"usage: {name} {{{','.join(kinds)}}} --workdir=DIR ...\n")
        for kind, about in EVALUATIONS.items():
            print(f"  {kind:<23}{about}")
        print(f"\nexample: {name} likelihood --workdir=runs/quickstart --json=result.json")
        print(f"{name} likelihood --help lists its arguments")
    else:
        given = argv[0] if argv else ""
        raise ValueError(f"unknown evaluation {given!r}; known: {', '.join(kinds)}")


def _output(text: str) -> Path:
    """An argparse type, a file to write, new or old: its folder is to be seen before the work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder; make it or give another path")
    return path


def _check_matplotlib(what: str) -> None:
    """ValueError without the library that draws, before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f'{what} needs the library matplotlib; pip install "sedd_jax[plot]"')


def _write_json(path: Path | None, result: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def _add_records(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--records", type=Path, help="records of sedd-prepare (default: the run's own)")
    add("--split", help="of the records (default: the run's heldout_split, test with --records)")


def _records(options: argparse.Namespace, model) -> tuple:
    """(records, split) that --records and --split name for a run's model."""
    from sedd_jax import data
    from sedd_jax.train import open_records

    if options.records is not None:
        return data.open_records(options.records), options.split or "test"
    own = open_records(model.config, options.workdir)
    return own, options.split or model.config.data.heldout_split


def _likelihood(name: str, argv: list[str]) -> None:
    parser = _parser(name, EVALUATIONS["likelihood"])
    add = parser.add_argument
    add("--workdir", type=Path, help=f"{MODEL} {WITH_RECORDS}")
    add("--gpt2", help="score with this GPT-2 instead: gpt2, gpt2-medium, a folder, a hub id")
    _add_records(parser)
    add("--blocks", type=int, help="score this many blocks (default: all)")
    add(
        "--passes",
        type=int,
        default=16,
        help="noise levels a block in a round, even; 16 or more: they are stratified within a "
        "round, so more of them do better than more rounds",
    )
    add(
        "--target_standard_error",
        type=float,
        help="go through the blocks again, round by round, until the bound's error is this, nats "
        "per token",
    )
    add("--max_passes", type=int, default=1024, help="the most noise levels a block for that")
    add("--batch_size", type=int, default=32, help="blocks a network call")
    add("--seed", type=int, default=0)
    add("--baselines", action="store_true", help="add n-gram models of the run's training text")
    add("--json", type=_output, help="also write the numbers to this file")
    options = parser.parse_args(argv)
    if (options.workdir is None) == (options.gpt2 is None):
        raise ValueError("give --workdir, or --gpt2 with --records")
    if options.gpt2 is not None and options.records is None:
        raise ValueError("--gpt2 needs --records: a folder made by sedd-prepare")
    if options.workdir is not None and options.records is None:
        _check_run(options.workdir, NEEDS_RECORDS)
    elif options.workdir is not None and options.baselines:
        _check_run(options.workdir, "leave --baselines out")
    from sedd_jax import data, report
    from sedd_jax.loading import load
    from sedd_jax.train import open_records

    if options.gpt2 is not None:
        from sedd_jax.evaluate.scorer import load_scorer

        result = report.evaluate_gpt2(
            load_scorer(options.gpt2),
            data.open_records(options.records),
            options.split or "test",
            blocks=options.blocks,
            batch_size=options.batch_size,
            progress=True,
        )
    else:
        model = load(options.workdir)
        records, split = _records(options, model)
        train = None
        if options.baselines:
            own = (
                records if options.records is None else open_records(model.config, options.workdir)
            )
            train = (own, model.config.data.train_split)
        result = report.evaluate_split(
            model,
            records,
            split,
            blocks=options.blocks,
            passes=options.passes,
            batch_size=options.batch_size,
            seed=options.seed,
            target_standard_error=options.target_standard_error,
            max_passes=options.max_passes,
            train=train,
            progress=True,
        )
    print(report.table(result))
    _write_json(options.json, result)


GRID_HELP = "times of the steps: uniform or cosine (default: the config's)"
DRAW_HELP = "exact or float32_gumbel, the original's (default: the config's)"


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--scorer", default="gpt2-large", help="gpt2 .. gpt2-xl, a folder, or a hub id@commit")
    add("--scorer_dtype", default="float32", help="float32 or bfloat16")
    add("--predictor", help="tweedie, euler or none (default: the config's)")
    add("--draw", help=DRAW_HELP)
    add("--grid", help=GRID_HELP)
    add("--batch_size", type=int, default=16, help="texts at once")
    add("--seed", type=int, default=0)
    add("--json", type=_output, help="also write the numbers to this file")


def _add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_samples", type=int, default=256)
    parser.add_argument("--length", type=int, help="tokens of a sample (default: the model's)")


def _chosen(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The options that every evaluation of samples takes, and those named besides."""
    names = ("batch_size", "seed", "predictor", "draw", "grid", *more)
    return {"progress": True, **{name: getattr(options, name) for name in names}}


def _model_and_scorer(options: argparse.Namespace):
    from sedd_jax.evaluate.scorer import load_scorer
    from sedd_jax.loading import load

    model = load(options.workdir)
    return model, load_scorer(options.scorer, dtype=options.scorer_dtype)


def _generative_perplexity(name: str, argv: list[str]) -> None:
    parser = _run_parser(name, EVALUATIONS["generative_perplexity"], MODEL)
    _add_sampling(parser)
    _add_samples(parser)
    parser.add_argument("--steps", type=int, help="reverse steps (default: the config's)")
    options = parser.parse_args(argv)
    from sedd_jax import generations

    result = generations.generative_perplexity(
        *_model_and_scorer(options), **_chosen(options, "num_samples", "length", "steps")
    )
    print(generations.table([result]))
    _write_json(options.json, result)


def _mauve(name: str, argv: list[str]) -> None:
    parser = _run_parser(name, EVALUATIONS["mauve"], f"{MODEL} {WITH_RECORDS}")
    _add_sampling(parser)
    add = parser.add_argument
    add("--steps", type=int, help="reverse steps (default: the config's)")
    add("--form", default="prefix", help="prefix: the first 50 given; infill: 25 at each end")
    _add_records(parser)
    add("--references", type=int, default=1000)
    add("--repeats", type=int, default=5)
    add("--buckets", type=int, help="clusters of MAUVE (default: a tenth of the texts)")
    options = parser.parse_args(argv)
    if options.records is None:
        _check_run(options.workdir, NEEDS_RECORDS)
    from sedd_jax import generations, report
    from sedd_jax.evaluate import mauve

    mauve.check(
        options.form,
        options.references,
        options.repeats,
        seed=options.seed,
        buckets=options.buckets,
    )
    model, scorer = _model_and_scorer(options)
    records, split = _records(options, model)
    report.check_records(model, records)
    result = generations.conditional_mauve(
        model,
        scorer,
        records,
        split,
        **_chosen(options, "form", "references", "repeats", "buckets", "steps"),
    )
    print(generations.mauve_table(result))
    _write_json(options.json, result)


def _pareto(name: str, argv: list[str]) -> None:
    parser = _run_parser(name, EVALUATIONS["pareto"], MODEL)
    _add_sampling(parser)
    add = parser.add_argument
    add("--steps", default="32,64,128,256,512,1024,2048", help="numbers of steps, commas between")
    _add_samples(parser)
    add("--picture", type=_output, help="also draw the curve to this PNG file")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.steps):
        raise ValueError(f"--steps {options.steps!r} is not like 32,64,128")
    if options.picture:
        _check_matplotlib("--picture")
    from sedd_jax import generations

    results = generations.pareto(
        *_model_and_scorer(options),
        [int(count) for count in options.steps.split(",")],
        **_chosen(options, "num_samples", "length"),
    )
    print(generations.table(results))
    _write_json(options.json, results)
    if options.picture:
        generations.pareto_picture(options.picture, results)


def _sample(name: str, argv: list[str]) -> None:
    parser = _parser(name, "Text from a trained model.")
    add = parser.add_argument
    add("--workdir", type=Path, help="the run's folder")
    add("--model", help="in its place: a hub id, owner/name@commit, or an exported folder")
    add("--template", help='text with free places, "Hi, my name is [MASK:20]."')
    add("--prefix", default="", help="text that every sample begins with")
    add("--suffix", default="", help="text that every sample ends with")
    add("--length", type=int, help="tokens of a sample (default: the model's)")
    add("--steps", type=int, help="reverse steps (default: the config's); few make poor text")
    add("--predictor", help="tweedie, euler or none (default: the config's)")
    add("--draw", help=DRAW_HELP)
    add("--grid", help=GRID_HELP)
    add("--seed", type=int, default=0)
    add("--num_samples", type=int, default=1)
    add("--batch_size", type=int, default=16, help="samples at once")
    add("--format", default="text", help="text, or jsonl: an object a line, batch by batch")
    add("--out", type=Path, help="write to this new file (default: standard output)")
    add("--html", type=Path, help="also write a page that plays the sampling to this new file")
    add("--live", action="store_true", help="show the first sample in the terminal as it comes")
    options = parser.parse_args(argv)
    if (options.workdir is None) == (options.model is None):
        raise ValueError("give --workdir, a run's folder, or --model, a hub id or a folder")
    for flag in ("prefix", "suffix", "length"):
        if options.template is not None and getattr(options, flag):
            raise ValueError(f"--template cannot go with --{flag}; write it into the template")
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; known: {', '.join(FORMATS)}")
    for flag in ("out", "html"):
        _check_new(flag, getattr(options, flag))
    if options.out is not None and options.out == options.html:
        raise ValueError(f"--out and --html are both {str(options.out)!r}; give two paths")
    from sedd_jax import data
    from sedd_jax.loading import load
    from sedd_jax.trajectory import Film

    source = options.workdir or options.model
    model = load(source)
    length = model.length if options.length is None else options.length
    known = None
    if options.template is not None:
        known = data.parse_template(options.template, model.tokenizer, model.length)
        length = None
    elif options.prefix or options.suffix:
        known = data.prefix_suffix(options.prefix, options.suffix, model.tokenizer, length)
    ours = model.config.sample
    chosen = {
        "seed": options.seed,
        "steps": ours.steps if options.steps is None else options.steps,
        "predictor": options.predictor or ours.predictor,
        "draw": options.draw or ours.draw,
        "grid": options.grid or ours.grid,
    }
    is_live = options.live and sys.stdout.isatty() and (options.format == "text" or options.out)
    states = model.stream(
        num_samples=options.num_samples,
        length=length,
        known=known,
        updates=64 if options.html or is_live else 20,
        t_min=ours.t_min,
        **chosen,
        batch_size=options.batch_size,
    )
    given = {flag: getattr(options, flag) for flag in ("template", "prefix", "suffix")}
    about = {**chosen, **{flag: text for flag, text in given.items() if text}}
    total = -(-options.num_samples // options.batch_size) * chosen["steps"]
    film, count = [], 0
    with FORMATS[options.format](options.out) as output:
        for state in _watched(states, total, is_live):
            if options.html:
                film.append(state)
            if state.step == state.steps:
                for text, tokens in zip(state.texts, state.tokens.tolist()):
                    output.write({"index": count, "text": text, "tokens": tokens, **about})
                    count += 1
    if options.html:
        steps = f"{chosen['steps']} steps, {chosen['predictor']}, seed {chosen['seed']}"
        Film(film, f"{Path(source).name}: {steps}").save(options.html)


def _check_new(flag: str, path: Path | None) -> None:
    """ValueError unless a file can be made at path, which is to be seen before the work."""
    if path is None:
        return
    if path.exists():
        raise ValueError(f"--{flag} {str(path)!r} exists already; move it or give another path")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--{flag} {str(path)!r} is in no folder; make it or give another path")


def _watched(states, total: int, is_live: bool):
    """The states as they come, with a bar or with the first text itself in the terminal."""
    from tqdm import tqdm

    from sedd_jax.trajectory.terminal import Redrawn

    redrawn = Redrawn(sys.stdout) if is_live else None
    hidden = redrawn is not None or not sys.stderr.isatty()
    with tqdm(desc="sample", unit=" steps", total=total, disable=hidden) as bar:
        last = 0
        for state in states:
            bar.update(state.step - last)
            last = 0 if state.step == state.steps else state.step
            if redrawn is not None:
                redrawn.draw(state)
                if state.step == state.steps:  # the first batch is drawn: no other is shown
                    redrawn = redrawn.close()
            yield state


class _Text:
    """Samples as text under numbers: all at the end, a file whole or not at all."""

    def __init__(self, path: Path | None):
        self.path, self.texts = path, []

    def __enter__(self):
        return self

    def write(self, sample: dict[str, Any]) -> None:
        self.texts.append(sample["text"])

    def __exit__(self, error, *_):
        if error is not None:
            return
        if self.path is None:
            _show(self.texts)
            return
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8", errors="replace") as file:
                _show(self.texts, file)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)


class _JsonLines:
    """Samples as JSON, a line each, which is there when the sample is."""

    def __init__(self, path: Path | None):
        self.path, self.file = path, None

    def __enter__(self):
        return self

    def write(self, sample: dict[str, Any]) -> None:
        if self.file is None:
            self.file = self.path.open("x", encoding="utf-8") if self.path else sys.stdout
        print(json.dumps(sample), file=self.file, flush=True)

    def __exit__(self, *_):
        if self.path is not None and self.file is not None:
            self.file.close()


FORMATS = {"text": _Text, "jsonl": _JsonLines}


def _show(texts: list[str], file=None) -> None:
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} " + "-" * 60, file=file)
        print(text, file=file)


def _report(name: str, argv: list[str]) -> None:
    parser = _run_parser(
        name, "A run's table, samples, picture.png and summary.json.", "the run's folder"
    )
    parser.add_argument("--template", help='text to infill, "The [MASK:24] statement."')
    parser.add_argument("--passes", type=int, default=16, help="noise levels a block, even")
    parser.add_argument("--began", type=float, help="Unix time that `seconds` counts from")
    options = parser.parse_args(argv)
    from sedd_jax.loading import load
    from sedd_jax.report import report, table

    _check_run(options.workdir, "for its bound give --records to sedd-eval likelihood")
    _check_matplotlib(name)
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
    _show(summary["samples"][:4])
    if options.template is not None:
        print(f"\n{options.template}")
        _show(summary["infill"])
    print(f"\nwritten: {options.workdir / 'summary.json'}, {options.workdir / 'picture.png'}")


def _convert(name: str, argv: list[str]) -> None:
    parser = _parser(
        name,
        "Checkpoints to and from the original PyTorch code. With --form=workdir, --config.KEY=VALUE "
        "sets a key of the run's config.",
    )
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, help="hub folder, run, .pth or workdir")
    add("--to", dest="target", type=Path, required=True, help="folder to write")
    add("--form", default="hub", help="of what is written: hub, original (a run) or workdir")
    add("--weights", default="ema", help="which of a run's go into a hub folder: ema or raw")
    add("--fresh_optimizer", action="store_true", help="begin AdamW's moments and warm-up again")
    add(
        "--tokenizer",
        help="the model's, where the source does not hold it: gpt2, bert, ..., or tokenizer.json of "
        "a workdir",
    )
    add("--tokenizer_path", default="", help="its files, as for sedd-prepare")
    options, rest = parser.parse_known_args(argv)
    changes = _changes(rest)
    from sedd_jax import convert

    done = convert.convert(
        options.source,
        options.target,
        form=options.form,
        weights=options.weights,
        optimizer=not options.fresh_optimizer,
        tokenizer=_named_tokenizer(options.tokenizer, options.tokenizer_path),
        changes=changes,
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


def _named_tokenizer(name: str | None, path: str):
    """The tokenizer of --tokenizer and --tokenizer_path; None without them."""
    from sedd_jax import data

    if name is None:
        if path:
            raise ValueError("--tokenizer_path needs --tokenizer, the kind of its files")
        return None
    return data.named_tokenizer(f"{name}:{path}" if path else name)


def _changes(arguments: list[str]) -> dict[str, Any]:
    """{"data.records": "DIR"} of --config.data.records=DIR; numbers and truths as JSON has them."""
    found = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ValueError(f"unknown argument {argument!r}; sedd-convert --help lists them")
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, or more of it than Python takes
            found[key] = {"True": True, "False": False}.get(text, text)
    return found
