"""The commands in a real pseudo-terminal of 80 columns: what a person reads there."""

import itertools
import re
import string
import tempfile
import time
from pathlib import Path

import pytest
from conftest import command_line
from pseudo_terminal import COLUMNS, draw, in_terminal

from sedd_jax.host import console

TIME = r"\d\d:\d\d:\d\d "
SILENCE = 15.0  # seconds, where another process may have the processor; alone it is 3


def check(capture) -> str:
    """The final screen, after what holds of every command."""
    assert capture.status == 0, capture.screen
    moments = list(itertools.accumulate(piece for _, piece in capture.pieces))
    for line in itertools.chain.from_iterable(map(draw, moments)):
        # A bar or a line of log over another, or one that was cut in two.
        assert not re.search(r"%\|.*(%\||\d parameters|held-out)|\w \.\.\. \d\d:\d\d.", line), line
    lines = capture.screen.splitlines()
    assert not re.search(r"\w \.\.\. \d\d:\d\d", capture.screen)  # nothing lasts any more
    for raw in capture.text.replace("\r", "\n").split("\n"):
        plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", raw)
        assert len(plain) <= COLUMNS, plain
    assert capture.longest_silence < SILENCE
    return "\n".join(lines)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The folder of a training's workdir, "run", and what a terminal showed of it."""
    folder = tmp_path_factory.mktemp("terminal")
    arguments = command_line("run", train__eval_every=4)
    return folder, in_terminal(folder, "train", *arguments)


def test_training_is_a_bar_below_lines_with_the_time(training):
    _, capture = training
    screen = check(capture)
    for activity in ("compiling", "evaluating", "saving"):
        assert f"{activity} ... 00:0" in capture.text
    for line in (
        TIME + r"[\d,]+ parameters, [\d,]+ blocks of 32 tokens",
        TIME + r"compiled in [\d.]+ s, .* a device",
        TIME + r"step 4: held-out bound [\d.]+ \+- [\d.]+ nats/token",
        r"train 100%\|█+\| 8/8 00:00 left, [\d.]+ nats/token [\d.]+k? tok/s",
    ):
        assert len(re.findall(f"^{line}$", screen, re.MULTILINE)) == 1, screen
    assert len(re.findall("^train", screen, re.MULTILINE)) == 1


def test_the_bound_is_a_table_of_80_columns(training):
    folder, _ = training
    arguments = ("--workdir=run", "--passes=2", "--blocks=4")
    capture = in_terminal(folder, "eval", "likelihood", *arguments)
    screen = check(capture)
    assert "compiling ..." in capture.text and "loading the model ..." in capture.text
    for line in (
        " +bits/char +nats/token",
        r" +SEDD, bound +([\d.]+±[\d.]+ +±[\d.]+ *){2}",
    ):
        assert re.search(f"^{line}$", screen, re.MULTILINE), screen


def test_a_live_sample_is_slow_enough_to_see(training):
    folder, _ = training
    capture = in_terminal(folder, "sample", "--workdir=run", "--steps=8", "--live")
    screen = check(capture)
    drawn = [second for second, piece in capture.pieces if "step " in piece]
    assert drawn[-1] - drawn[0] > 0.7  # nine states, 0.1 s each
    assert screen.startswith("--- 1 ---") and "step 8 of 8" in capture.text


def test_a_report_fits_in_80_columns(training):
    folder, _ = training
    pytest.importorskip("matplotlib")
    capture = in_terminal(folder, "report", "--workdir=run", "--passes=2")
    assert check(capture).endswith("written: run/summary.json\nwritten: run/picture.png")
    assert "drawing ... 00:0" in capture.text


def test_a_preparation_fits_in_80_columns():
    with tempfile.TemporaryDirectory() as folder:  # whose name is short: the last line has it
        check_preparation(Path(folder))


def check_preparation(tmp_path):
    lines = (f"{string.ascii_letters} {i}\n" for i in range(2000))
    (tmp_path / "my.txt").write_text("".join(lines))
    flags = ("--dataset=text", "--manual_dir=my.txt", "--tokenizer=bytes", "--out=records")
    screen = check(in_terminal(tmp_path, "prepare", *flags, "--length=64"))
    line = r"^train +1 +[\d,]+ +[\d,]+ +[\d,]+  [0-9a-f]{12}$"
    assert re.search(line, screen, re.MULTILINE), screen


def test_draw_reads_a_terminals_controls():
    assert draw("a\rb\r\nlong") == ["b", "long"]
    assert draw("bar\r\n\rbelow\x1b[A\r   \rlog") == ["log", "below"]
    assert draw("x" * 81) == ["x" * 80, "x"]
    assert draw("one\r\ntwo\r\n\x1b[2F\x1b[Jnew") == ["new"]


def test_a_log_file_has_a_line_now_and_then_and_none_of_short_work(capsys, monkeypatch):
    with console.progress_bar(total=2, desc="short", is_shown=True) as bar:
        bar.update(2)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    for shown in (True, False):
        with console.progress_bar(total=3, desc="sample", unit=" steps", is_shown=shown) as bar:
            bar.set_postfix_str("compiling ...")
            for _ in range(3):
                time.sleep(0.03)
                bar.update(1)
                bar.set_postfix_str("", refresh=False)
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(TIME + "sample [123] of 3 steps, 00:00 left", line) for line in lines)
    assert lines[0].endswith("1 of 3 steps, 00:00 left: compiling ...") and len(lines) == 3


def test_a_log_file_is_told_of_a_step_that_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.5)
    with console.progress_bar(total=3, desc="sample", unit=" steps", is_shown=True) as bar:
        bar.set_postfix_str("compiling ...")
        with console.ticking(bar):
            time.sleep(1.3)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(TIME + "sample 0 of 3 steps: compiling ...", line)
