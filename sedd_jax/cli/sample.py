"""sedd-sample."""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sedd_jax.cli.arguments import (
    add_sampling,
    add_step,
    add_tokenizer,
    make_parser,
    name_or_path,
    named_tokenizer,
    new_file,
    path,
)
from sedd_jax.cli.messages import visible
from sedd_jax.files import replacing

OPTIONS = ("steps", "predictor", "draw", "grid")  # the config's, where the command names none


def run(name: str, argv: list[str]) -> None:
    options = _parsed(name, argv)
    from sedd_jax import data
    from sedd_jax.inference.pretrained import load
    from sedd_jax.inference.trajectory import Animation

    source = options.workdir or options.model
    model = load(source, step=options.step, tokenizer=named_tokenizer(options))
    if options.explain:
        print(explained(model, {key: getattr(options, key) for key in OPTIONS}))
        return
    length, known = options.length, None
    if options.template is None and (options.prefix or options.suffix):
        length = model.length if length is None else length
        known = data.prefix_suffix(options.prefix, options.suffix, model.tokenizer, length)
    sampling = model.chosen(**{key: getattr(options, key) for key in OPTIONS})
    chosen = {key: getattr(sampling, key) for key in OPTIONS}
    is_live = options.live and sys.stdout.isatty() and (options.format == "text" or options.out)
    states = model.stream(
        options.template,
        options.num_samples,
        length=length,
        known=known,
        updates=64 if options.html or is_live else 20,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=not is_live and sys.stderr.isatty(),
        **chosen,
    )
    texts = {flag: getattr(options, flag) for flag in ("template", "prefix", "suffix")}
    about = {"seed": options.seed, **chosen, **{flag: text for flag, text in texts.items() if text}}
    seen = []

    def samples() -> Iterator[dict[str, Any]]:
        index = itertools.count()
        for state in _watched(states, is_live):
            if options.html:
                seen.append(state)
            if state.step == state.steps:
                for text, tokens in zip(state.texts, state.tokens.tolist()):
                    yield {"index": next(index), "text": text, "tokens": tokens, **about}

    FORMATS[options.format](samples(), options.out)
    if options.html:
        steps = f"{chosen['steps']} steps, {chosen['predictor']}, seed {options.seed}"
        Animation(seen, f"{Path(source).name}: {steps}").save(options.html)


def _parsed(name: str, argv: list[str]) -> argparse.Namespace:
    """The arguments; ValueError for what can be seen to be wrong before a model is loaded."""
    parser = make_parser(name, "Text from a trained model.")
    add = parser.add_argument
    add("--workdir", type=path, help="the run's folder")
    add(
        "--model",
        type=name_or_path,
        help="in its place: a hub id, owner/name@commit, or an exported folder",
    )
    add_step(parser)
    add_tokenizer(parser)
    add("--template", help='text with free positions, "Hi, my name is [MASK:20]."')
    add("--prefix", default="", help="text that every sample begins with")
    add("--suffix", default="", help="text that every sample ends with")
    add("--length", type=int, help="tokens of a sample (default: the model's)")
    add("--steps", type=int, help="reverse steps (default: the config's); few make poor text")
    add_sampling(parser)
    add("--seed", type=int, default=0)
    add("--num_samples", type=int, default=1)
    add("--batch_size", type=int, default=16, help="samples at once")
    add("--format", default="text", help="text, or jsonl: an object a line, batch by batch")
    add("--out", type=new_file, help="write to this new file (default: standard output)")
    add("--html", type=new_file, help="also write a page that plays the sampling to this new file")
    add("--explain", action="store_true", help="say what would be done and its price; draw nothing")
    add("--live", action="store_true", help="show the first sample in the terminal as it comes")
    options = parser.parse_args(argv)
    if (options.workdir is None) == (options.model is None):
        raise ValueError("give --workdir, a run's folder, or --model, a hub id or a folder")
    for flag in ("prefix", "suffix", "length"):
        if options.template is not None and getattr(options, flag):
            raise ValueError(f"--template cannot go with --{flag}; write it into the template")
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; known: {', '.join(FORMATS)}")
    if options.out is not None and options.out == options.html:
        raise ValueError(f"--out and --html are both {str(options.out)!r}; give two paths")
    return options


def explained(model, options: dict[str, Any]) -> str:
    """What sampling with these options does, and the price of so few calls, in a few lines."""
    from sedd_jax.evaluation.likelihood import price_of_calls, price_table

    sampling = model.chosen(**options)
    steps = "the denoiser alone" if sampling.nfe == 1 else f"{sampling.steps} steps and a denoiser"
    lines = [
        f"predictor {sampling.predictor}, grid {sampling.grid}, draw {sampling.draw}",
        f"{steps}: {sampling.nfe} network calls a sample, the last at t = {sampling.t_min:.3g}",
    ]
    if model.curve is not None:
        of_step = model.curve.about.get("step")
        lines += [f"the price of Tweedie's steps, by the curve of cross entropy of step {of_step}:"]
        lines += price_table(price_of_calls(model, model.curve, [sampling.nfe]))
    elif model.graph.dim > model.graph.vocab_size:
        lines.append(
            "no price: the model comes without the curve of cross entropy that sedd-eval "
            "likelihood keeps in its run's folder"
        )
    return "\n".join(lines)


def _watched(states: Iterable, is_live: bool) -> Iterator:
    """The states as they come, with the first text in the terminal if it is live."""
    from sedd_jax.cli.terminal import TerminalView

    view = TerminalView(sys.stdout) if is_live else None
    for state in states:
        if view is not None:
            view.draw(state)
            if state.step == state.steps:  # the first batch is drawn: no other is shown
                view = view.close()
        yield state


def _write_text(samples: Iterable[dict[str, Any]], path: Path | None) -> None:
    """The texts under numbers: all at the end, a file whole or not at all."""
    texts = [sample["text"] for sample in samples]
    if path is None:
        show(texts)
        return
    try:
        with replacing(path, "w", encoding="utf-8", errors="replace") as file:
            show(texts, file)
    except OSError:  # the disk is full: all the work is done
        show(texts)
        raise


def _write_json_lines(samples: Iterable[dict[str, Any]], path: Path | None) -> None:
    """An object a line, which is there when the sample is; no file before the first."""
    with contextlib.ExitStack() as stack:
        file = None if path else sys.stdout
        for sample in samples:
            if file is None:
                file = stack.enter_context(path.open("x", encoding="utf-8"))
            print(json.dumps(sample), file=file, flush=True)


FORMATS = {"text": _write_text, "jsonl": _write_json_lines}


def show(texts: list[str], file: TextIO | None = None) -> None:
    """The texts under numbers; a terminal does not get what it would act on."""
    file = file or sys.stdout
    if file is not None and file.isatty():
        texts = [visible(text) for text in texts]
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} " + "-" * 60, file=file)
        print(text, file=file)
