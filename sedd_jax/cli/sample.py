"""sedd-sample: draw, infill or revise text with a model."""

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sedd_jax.cli.arguments import (
    add_model,
    add_sampling,
    check_sampling,
    make_parser,
    new_file,
    path,
    sampling_of,
    say_written,
)
from sedd_jax.cli.cluster import load_model, run_joined
from sedd_jax.cli.messages import visible
from sedd_jax.host.console import activity
from sedd_jax.host.files import replacing

OPTIONS = ("steps", "predictor", "draw", "grid")  # that every sample says it was drawn with


def run(name: str, argv: list[str]) -> int:
    parser = make_parser(name, "Text from a trained model.")
    return run_joined(name, parser, argv, functools.partial(_sample, parser))


def _sample(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    options = _parsed(parser, argv)
    from sedd_jax import data
    from sedd_jax.inference.trajectory import Animation
    from sedd_jax.parallel import processes

    named = sampling_of(options, "steps")
    check_sampling(options, "steps")
    model = load_model(options)
    if options.explain:
        print(explained(model, named, options))
        return
    length, known = options.length, None
    if options.template is None and (options.prefix or options.suffix):
        length = model.length if length is None else length
        known = data.prefix_suffix(options.prefix, options.suffix, model.tokenizer, length)
    sampling = model.chosen(**named)
    chosen = {key: getattr(sampling, key) for key in OPTIONS} | named
    is_live = options.live and sys.stdout.isatty() and (options.format == "text" or options.out)
    is_watched = options.animation or processes.on_first_process(lambda: bool(is_live))
    how = {
        "updates": 64 if is_watched else 20,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "progress": not is_live,
        **chosen,
    }
    if options.revise is not None:
        states, revised = _revised(model, options, sampling, how)
    else:
        known = {"length": length, "known": known}
        states, revised = model.stream(options.template, options.num_samples, **known, **how), {}
    texts = {flag: getattr(options, flag) for flag in ("template", "prefix", "suffix")}
    about = {"seed": options.seed, **chosen, **{flag: text for flag, text in texts.items() if text}}
    about |= revised
    seen = []

    def samples() -> Iterator[dict[str, Any]]:
        index = itertools.count()
        for state in _watched(states, is_live):
            if options.animation:
                seen.append(state)
            if state.step == state.steps:
                calls = [0] * len(state.rows) if state.calls is None else state.calls.tolist()
                for text, tokens, nfe in zip(state.texts, state.rows, calls):
                    sample = {"index": next(index), "text": text, "tokens": tokens.tolist()}
                    sample["nfe"] = nfe
                    if revised:
                        sample["draft"] = sample["index"] // options.num_samples
                    yield sample | about

    FORMATS[options.format](samples(), options.out)
    if options.animation:
        steps = f"{chosen['steps']} steps, {chosen['predictor']}, seed {options.seed}"
        steps += f", strength {revised['strength']:g}" if revised else ""
        with activity("drawing", processes.is_first()):
            Animation(seen, f"{options.workdir.name}: {steps}").save(options.animation)
    say_written(options.out, options.animation)


def _parsed(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The arguments; ValueError for what can be seen to be wrong before a model is loaded."""
    add = parser.add_argument
    add_model(parser)
    add("--template", help='text with free positions, "Hi, my name is [MASK:20]."')
    add("--prefix", default="", help="text that every sample begins with")
    add("--suffix", default="", help="text that every sample ends with")
    add("--revise", type=path, help="a file with a draft to noise in part; .jsonl: one a line")
    add("--strength", type=float, help="of --revise, from 0, the draft, to 1, anew (default: 0.5)")
    add(
        "--keep", action="append", help="text of the draft to keep where it occurs; may be repeated"
    )
    add("--length", type=int, help="tokens of a sample (default: the model's)")
    add("--steps", type=int, help="reverse steps (default: the config's); few make poor text")
    add_sampling(parser)
    add("--seed", type=int, default=0, help="of the samples")
    add("--num_samples", type=int, default=1, help="texts; of each draft with --revise")
    add("--batch_size", type=int, default=16, help="samples at once")
    add("--format", default="text", help="text, or jsonl: an object a line, batch by batch")
    add("--out", type=new_file, help="write to this new file (default: standard output)")
    add(
        "--animation",
        "--html",
        type=_animation_file,
        metavar="FILE",
        help="also write the sampling as an animation to this new file: .html, a page that plays "
        "it, or .gif or .svg of the first sample",
    )
    add("--explain", action="store_true", help="say what would be done and its price; draw nothing")
    add("--live", action="store_true", help="show the first sample in the terminal as it comes")
    options = parser.parse_args(argv)
    for flag in ("prefix", "suffix", "length"):
        if options.template is not None and getattr(options, flag):
            raise ValueError(f"--template cannot go with --{flag}; write it into the template")
    for flag in ("template", "prefix", "suffix", "length"):
        if options.revise is not None and getattr(options, flag):
            raise ValueError(f"--revise cannot go with --{flag}; write it into the draft")
    for flag in ("strength", "keep"):
        if options.revise is None and getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is for --revise=FILE, which is missing; add it")
    if options.revise is not None:
        options.drafts = _drafts(options.revise)
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; known: {', '.join(FORMATS)}")
    if options.out is not None and options.out == options.animation:
        raise ValueError(f"--out and --animation are both {str(options.out)!r}; give two paths")
    return options


def _animation_file(text: str) -> Path:
    """An argparse type, a new_file with an ending of an animation."""
    from sedd_jax.inference.trajectory import format_of

    try:
        format_of(path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return new_file(text)


def _drafts(file: Path) -> list[str]:
    """The text of a file without the line break at its end; those of a .jsonl file's lines."""
    from sedd_jax.data.text_formats import documents

    if not file.is_file():
        raise ValueError(f"--revise: no file at {str(file)!r}; give one that holds a draft")
    read = list(documents(file.name, file, lambda file: file.open("rb")))
    drafts = [text for _, text in read]
    if [number for number, _ in read] == [""]:  # all of the file
        drafts = [drafts[0].removesuffix("\n").removesuffix("\r")]
    if not all(drafts) or not drafts:
        number = f" {drafts.index('')}" if len(drafts) > 1 else ""
        raise ValueError(f"--revise: draft{number} of {str(file)!r} is empty; write text there")
    return drafts


def _revised(
    model: Any, options: argparse.Namespace, sampling: Any, how: dict[str, Any]
) -> tuple[Iterator, dict[str, Any]]:
    """The states of revising the drafts, and what to say of it beside each sample."""
    strength, start = _start(model, options, sampling)
    keep = options.keep or []
    states = model.stream_revisions(
        options.drafts, options.num_samples, strength=strength, keep=keep, **how
    )
    about = {"strength": strength, "time": start.time}
    return states, about | ({"keep": keep} if keep else {})


def _start(model: Any, options: argparse.Namespace, sampling: Any) -> tuple[float, Any]:
    """The strength of a revision, and where it begins."""
    from sedd_jax.inference import revision

    strength = revision.STRENGTH if options.strength is None else options.strength
    return strength, revision.start_of(strength, sampling, model.times_of(sampling))


def explained(model: Any, named: dict[str, Any], options: argparse.Namespace) -> str:
    """What sampling with these options does, and the price of so few calls, in a few lines."""
    from sedd_jax.evaluation.likelihood import price_of_calls, price_table

    sampling = model.chosen(**named)
    if options.revise is not None:
        strength, start = _start(model, options, sampling)
    if model.objective.is_causal:
        calls = f"at most {sampling.nfe} a sample"
        return f"from left to right: a network call for each token that is not known, {calls}"
    steps = "the denoiser alone" if sampling.nfe == 1 else f"{sampling.steps} steps and a denoiser"
    most = "at most " if sampling.trait("is_adaptive") else ""
    calls = f"{most}{sampling.nfe} network calls a sample"
    if model.objective.is_continuous:
        return f"reverse steps of embeddings, {steps}: {calls}"
    lines = [
        f"predictor {sampling.predictor}, grid {sampling.grid}, draw {sampling.draw}",
        f"{steps}: {calls}, the denoiser's at t = {sampling.t_min:.3g}",
    ]
    if options.revise is not None:
        lines.append(
            f"a revision of strength {strength:g} begins at t = {start.time:.3g}: {start.nfe} calls"
        )
    if model.curve is not None:
        of_step = model.curve.about.get("step")
        lines += [f"the price of Tweedie's steps, by the curve of cross entropy of step {of_step}:"]
        lines += price_table(price_of_calls(model, model.curve, [sampling.nfe]))
    elif model.objective.has_curve and model.graph.mask is not None:
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
