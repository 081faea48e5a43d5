"""States of sampling, and the page that plays them, opened in a real browser where there is one."""

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import real, says

from sedd_jax.cli.terminal import TerminalView, screenful
from sedd_jax.data.tokenizers import GPT2, Bytes, Characters
from sedd_jax.inference.trajectory import Animation, State, _changes, show

HOSTILE = (
    "</script><script>document.body.dataset.owned = 1</script><!-- <script> "
    '<img src=x onerror="document.body.dataset.owned = 1"> &amp; &lt; \'" \u2028 \u2029 '
    "</iframe> @TITLE@ @STATES@ \\u003c ${1} 日本 🙂\nlast line "
)


def some_states(text, tokenizer=None, *, known=0, samples=1, updates=8, uniform=False):
    """A text's states as the absorbing graph would give them, or with noise for masks."""
    tokenizer = tokenizer or Bytes()
    x0 = np.broadcast_to(tokenizer.encode(text), (samples, len(tokenizer.encode(text))))
    generator = np.random.default_rng(0)
    is_known = np.broadcast_to(np.arange(x0.shape[1]) < known, x0.shape)
    moments = np.where(is_known, 2.0, generator.random(x0.shape))
    states = []
    for k in range(updates + 1):
        noise = generator.integers(tokenizer.vocab_size, size=x0.shape)
        xt = np.where(moments > 1.0 - k / updates, x0, noise if uniform else tokenizer.vocab_size)
        states.append(State(3 * k, 3 * updates, xt.astype(np.int32), is_known, tokenizer))
    return states


# --- states


def test_a_state_shows_its_texts_and_where_the_masks_are():
    tokens = np.array([[0, 1, 3, 2], [3, 3, 3, 3]], np.int32)
    state = State(2, 8, tokens, np.zeros((2, 4), bool), Characters("\nab"))
    assert state.texts == ["\na░b", "░░░░"]
    assert state.pieces == [["\n", "a", "░", "b"], ["░"] * 4]
    np.testing.assert_array_equal(state.is_masked, tokens == 3)
    assert str(state) == "step 2 of 8\n--- 1 ---\n\na░b\n--- 2 ---\n░░░░"
    one = State(8, 8, tokens[:1], np.zeros((1, 4), bool), Characters("\nab"))
    assert str(one) == repr(one) == "step 8 of 8\n\na░b"


def test_a_state_in_a_notebook_escapes_its_text_and_stops_after_a_few():
    (*_, state) = some_states(HOSTILE, known=3, samples=6)
    shown = state._repr_html_()
    assert "<script" not in shown and "<img" not in shown and "and 2 more" in shown
    assert text_of(shown, "p") == HOSTILE * 4
    half = Characters("\ud800\n")
    state = State(0, 1, np.array([[0]]), np.array([[True]]), half)
    assert "\ufffd" in state._repr_html_() and "\ufffd" in Animation([state], "\ud800").html


def test_every_fault_of_states_is_named(tmp_path):
    with says("tokens (4,) and is_known (4,) are not one [N, L]"):
        State(0, 8, np.zeros(4, int), np.zeros(4, bool), Bytes())
    with says("tokens (1, 4) and is_known (4,) are not one [N, L]"):
        State(0, 8, np.zeros((1, 4), int), np.zeros(4, bool), Bytes())
    with says("0 states make no animation"):
        show([])
    a, b = some_states("ab"), some_states("abc")
    for states in ([a[0], b[1]], [*a, *b], [*a, *a[1:]], [a[0], some_states("ab", samples=2)[1]]):
        with says(f"{len(states)} states differ in their steps, samples or lengths; give those"):
            Animation(states)
    with says("no folder for the page", "none/a.html"):
        show(iter([]), path=tmp_path / "none/a.html")


def test_a_terminal_gets_lines_that_fit_and_no_control_characters(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    state = some_states("ab\x1b[2J 東京 cd\n" + "x" * 25, known=2)[-1]
    lines = screenful(state, columns=10, lines=4)
    assert lines[0].startswith("\x1b[4mab\x1b[0m·[2J ")
    plain = [re.sub(r"\x1b\[[0-9]m", "", line) for line in lines]
    assert plain == ["ab·[2J 東", "京 cd", "xxxxxxxxxx", "..."]
    assert screenful(some_states("abc")[0], 10, 4) == ["\x1b[2m░░░\x1b[0m"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert screenful(some_states("abc")[0], 10, 4) == ["░░░"]


def test_a_terminal_is_redrawn_in_place_and_left_as_it_was(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((11, 7)))
    terminal = io.StringIO()
    view = TerminalView(terminal)
    first, *_, last = some_states("abc")
    view.draw(first)
    view.draw(last)
    view.close()
    assert terminal.getvalue() == (
        "step 0 of 24\n\x1b[2m░░░\x1b[0m\n\x1b[2F\x1b[Jstep 24 of 24\nabc\n\x1b[2F\x1b[J"
    )


# --- the page's data


def states_from(animation, n):
    """The pieces of sample n in every state, rebuilt from the changes."""
    rows = [list(animation["samples"][n]["first"])]
    for change in animation["samples"][n]["changes"]:
        row, at = list(rows[-1]), 0
        for gap, entry in zip(change[::2], change[1::2]):
            at += gap
            row[at] = entry
        rows.append(row)
    return [[animation["table"][entry] for entry in row] for row in rows]


@pytest.mark.parametrize("uniform", [False, True])
def test_the_changes_of_a_animation_give_back_every_state(uniform):
    states = some_states("naïve 東京 🙂 end", samples=3, known=2, uniform=uniform)
    animation = _changes(states)
    assert animation["steps"] == [state.step for state in states] and animation["of"] == 24
    for n in range(3):
        for state, row in zip(states, states_from(animation, n), strict=True):
            assert [piece for _, piece in row] == state.pieces[n]
            assert [token for token, _ in row] == state.tokens[n].tolist()
        assert animation["samples"][n]["known"] == "11" + "0" * (states[0].tokens.shape[1] - 2)


def test_batches_that_came_one_after_the_other_make_one_animation():
    together = some_states("some text", samples=3)
    batches = [
        State(s.step, s.steps, s.tokens[rows], s.is_known[rows], s.tokenizer)
        for rows in (slice(2), slice(2, 3))
        for s in together
    ]
    assert Animation(batches).html == Animation(together).html


@cache
def gpt2():
    return GPT2.make(str(real("gpt2_bpe")), None)


@pytest.mark.parametrize("uniform, most", [(False, 0.1), (True, 2.0)])
def test_a_animation_of_128_states_of_1024_tokens_is_small(uniform, most):
    text = real("wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    text = gpt2().decode(gpt2().encode(text[:10_000])[:1024])
    # With noise drawn anew for every state, more than any sampler changes.
    states = some_states(text, gpt2(), updates=127, uniform=uniform)
    assert len(states) == 128 and states[0].tokens.shape[1] >= 1000
    assert len(Animation(states).html.encode()) < most * 1e6


def test_the_page_holds_no_address_and_no_markup_of_a_text(tmp_path):
    animation = show(some_states(HOSTILE), title=HOSTILE, path=tmp_path / "animation.html")
    page = (tmp_path / "animation.html").read_text(encoding="utf-8")
    assert page == animation.html and len(list(tmp_path.iterdir())) == 1
    assert page.count("<script") == page.count("</script>") == 2
    assert animation.states[-1].texts == [HOSTILE]
    assert (
        animation._repr_html_().count("<iframe") == animation._repr_html_().count("</iframe>") == 1
    )
    assert animation.save(tmp_path / "animation.html").stat().st_size == len(page.encode())
    page = Animation(some_states("some text")).html
    assert "default-src 'none'" in page and not re.search(r"https?:|src=|@import|url\(", page)


# --- notebooks


class Notebook:
    """What `show` uses of IPython."""

    def __init__(self, monkeypatch, kernel):
        self.shell = types.SimpleNamespace(execution_count=1, kernel=kernel)
        self.outputs = []
        ipython = types.ModuleType("IPython")
        ipython.get_ipython = lambda: self.shell
        ipython.display = types.ModuleType("IPython.display")
        ipython.display.HTML = str
        ipython.display.display = self.display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)

    def display(self, content, display_id=False):
        output = [content]
        self.outputs.append(output)
        return types.SimpleNamespace(update=output.append)


def test_a_notebook_shows_the_states_in_one_output_and_the_animation_in_the_end(monkeypatch):
    notebook = Notebook(monkeypatch, kernel=object())
    monkeypatch.setattr("sedd_jax.inference.trajectory.PAUSE", 0.0)
    states = some_states("some text")
    animation = show(iter(states))
    shown = [state._repr_html_() for state in states]
    assert notebook.outputs == [["", *shown, animation._repr_html_()]]
    animation._ipython_display_()  # the cell's value: it is on the screen already
    assert len(notebook.outputs) == 1
    notebook.shell.execution_count = 2
    animation._ipython_display_()
    assert notebook.outputs[1:] == [[animation._repr_html_()]]


@pytest.mark.parametrize("kernel, kind, live", [(None, iter, True), (1, iter, False), (1, list, 1)])
def test_nothing_is_shown_in_a_terminal_or_when_the_states_are_there(
    monkeypatch, kernel, kind, live
):
    notebook = Notebook(monkeypatch, kernel)
    animation = show(kind(some_states("some text")), live=live)
    assert notebook.outputs == [] and len(animation.states) == 9


# --- the page in a browser


class _Text(HTMLParser):
    """The text of every element with this id or tag."""

    def __init__(self, wanted):
        super().__init__(convert_charrefs=True)
        self.wanted, self.depth, self.found = wanted, 0, []

    def handle_starttag(self, tag, attributes):
        if self.depth or self.wanted in (tag, dict(attributes).get("id")):
            self.depth += tag not in ("meta", "input", "img", "br")

    def handle_endtag(self, tag):
        self.depth -= self.depth > 0

    def handle_data(self, data):
        self.found += [data] if self.depth else []


def text_of(page, wanted):
    parser = _Text(wanted)
    parser.feed(page)
    return "".join(parser.found)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=30000",  # milliseconds of the page's clock
)
RECORDER = """<head><script>onerror = (message) => {
document.documentElement.dataset.errors = message; };</script>"""


@pytest.fixture
def browse(tmp_path):
    """A page's HTML -> its document after the scripts ran, opened from a file."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")

    def run(page, fragment=""):
        file = tmp_path / "page.html"
        file.write_text(page.replace("<head>", RECORDER, 1), encoding="utf-8")
        command = [browser, *OPTIONS, f"--user-data-dir={tmp_path / 'user'}"]
        done = subprocess.run(
            [*command, "--dump-dom", f"{file.as_uri()}{fragment}"],
            capture_output=True,
            timeout=120,
            check=True,
        )
        return done.stdout.decode("utf-8")

    return run


def test_an_error_in_a_page_would_be_seen(browse):
    page = "<html><head></head><body><script>nowhere()</script></body></html>"
    assert "nowhere is not defined" in browse(page)


def test_the_page_shows_the_sample_and_its_states(browse):
    states = some_states(HOSTILE, known=4, samples=2)
    animation = Animation(states, title=HOSTILE)
    for fragment, state, n in (
        ("", -1, 0),
        ("#state=0", 0, 0),
        ("#state=4&sample=1", 4, 1),
        ("#state=-2", -2, 0),
        ("#state=0&play", -1, 0),  # played to its end
        ("#state=x&sample=9", -1, 0),
    ):
        document = browse(animation.html, fragment)
        assert text_of(document, "text") == states[state].texts[n], fragment
        assert text_of(document, "count") == f"step {states[state].step} of 24"
        assert text_of(document, "title") == 2 * HOSTILE  # <title> and the heading
        assert "data-errors" not in document and "data-owned" not in document
        masks = len(re.findall(r'class="t masked', document))
        assert masks == states[state].is_masked[n].sum()
        assert len(re.findall(r'class="t(?: \w+)* given', document)) == 4
        assert ("playing" in document.split("<body", 1)[1][:30]) is False


def test_what_just_changed_is_highlighted_and_a_animation_of_one_state_is_shown(browse):
    states = some_states("some text", uniform=True)
    document = browse(Animation(states).html, "#state=3")
    changed = states[3].tokens != states[2].tokens
    assert len(re.findall(r"--heat: 1(?:\.00)?;", document)) == changed.sum() > 0
    assert "masked</span>" in document and 'id="says-masked" hidden' in document
    document = browse(Animation(states[:1]).html)
    assert text_of(document, "text") == states[0].texts[0] and "data-errors" not in document


def test_the_page_answers_to_keys_and_pointer(browse):
    states = some_states("some text", known=1, samples=2)
    acts = """<script>{
      const seen = [], text = document.getElementById("text"), get = id =>
        document.getElementById(id);
      const press = (key, target = document.body) => target.dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      const note = name => seen.push(name + ": " + get(name).textContent);
      press("ArrowLeft"); note("count"); press("ArrowRight"); note("count");
      text.children[0].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
      note("about");
      get("slider").value = 0; get("slider").dispatchEvent(new Event("input"));
      text.children[3].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
      note("about"); press(" "); note("text"); press(" ");
      get("sample").value = 1; get("sample").dispatchEvent(new Event("change"));
      press("End", get("slider")); get("order").click();
      seen.push(document.body.className, get("play").ariaLabel);
      document.body.dataset.seen = JSON.stringify(seen);
    }</script></body>"""
    document = browse(Animation(states).html.replace("</body>", acts))
    assert "data-errors" not in document
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', document)[1]))
    assert seen == [
        "count: step 21 of 24",
        "count: step 24 of 24",
        f'about: position 0 · token {ord("s")} · "s" · given',
        f"about: position 3 · masked · settled by step {settled(states, 3)}",
        f"text: {states[0].texts[0]}",
        "order",
        "Play",
    ]


def settled(states, position):
    row = [state.tokens[0, position] for state in states]
    return states[row.index(row[-1])].step


def test_the_page_works_inside_a_notebooks_frame(browse):
    animation = Animation(some_states(HOSTILE), title=HOSTILE)
    page = f"""<html><head></head><body>{animation._repr_html_()}<pre id="found"></pre><script>
    onload = () => setTimeout(() => {{
      const frame = document.querySelector("iframe"), inside = frame.contentDocument;
      document.getElementById("found").textContent = inside.getElementById("text").textContent;
      document.body.dataset.height = parseInt(frame.style.height);
    }}, 500);</script></body></html>"""
    document = browse(page)
    assert text_of(document, "found") == HOSTILE
    assert 150 < int(re.search(r'data-height="(\d+)"', document)[1]) <= 680
    assert "data-owned" not in document
