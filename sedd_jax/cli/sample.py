"""sedd-sample."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from sedd_jax.cli.arguments import add_sampling, make_parser


def run(name: str, argv: list[str]) -> None:
    parser = make_parser(name, "Text from a trained model.")
    add = parser.add_argument
    add("--workdir", type=Path, help="the run's folder")
    add("--model", help="in its place: a hub id, owner/name@commit, or an exported folder")
    add("--template", help='text with free places, "Hi, my name is [MASK:20]."')
    add("--prefix", default="", help="text that every sample begins with")
    add("--suffix", default="", help="text that every sample ends with")
    add("--length", type=int, help="tokens of a sample (default: the model's)")
    add("--steps", type=int, help="reverse steps (default: the config's); few make poor text")
    add_sampling(parser)
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
    from sedd_jax.inference.film import Animation
    from sedd_jax.inference.pretrained import load

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
        Animation(film, f"{Path(source).name}: {steps}").save(options.html)


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

    from sedd_jax.cli.terminal import TerminalView

    redrawn = TerminalView(sys.stdout) if is_live else None
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
            show(self.texts)
            return
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8", errors="replace") as file:
                show(self.texts, file)
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


def show(texts: list[str], file=None) -> None:
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} " + "-" * 60, file=file)
        print(text, file=file)
