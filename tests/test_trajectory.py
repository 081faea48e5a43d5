"""States of sampling, and the page that plays them, opened in a real browser where there is one."""

import dataclasses
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
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import real, says

from sedd_jax.cli.terminal import TerminalView, screenful
from sedd_jax.data.tokenizers import GPT2, Bytes, Characters
from sedd_jax.diffusion.graphs import Absorbing, Uniform
from sedd_jax.diffusion.schedules import Geometric
from sedd_jax.inference.sampling import Sampling
from sedd_jax.inference.states import DiffusionSampler
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
        level = 1.0 - k / updates if uniform else None
        state = State(3 * k, 3 * updates, xt.astype(np.int32), is_known, tokenizer)
        states.append(dataclasses.replace(state, noise_level=level))
    return states


# --- states


def test_a_state_shows_its_texts_and_where_the_masks_are():
    tokens = np.array([[0, 1, 3, 2], [3, 3, 3, 3]], np.int32)
    state = State(2, 8, tokens, np.zeros((2, 4), bool), Characters("\nab"))
    assert state.texts == ["\na░b", "░░░░"]
    assert state.pieces == [["\n", "a", "░", "b"], ["░"] * 4]
    np.testing.assert_array_equal(state.is_masked, tokens == 3)
    assert str(state) == "step 2 of 8, 62% masked\n--- 1 ---\n\na░b\n--- 2 ---\n░░░░"
    one = State(8, 8, tokens[:1], np.zeros((1, 4), bool), Characters("\nab"))
    assert str(one) == repr(one) == "step 8 of 8, 25% masked\n\na░b"


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
    with says("no folder for", "none/a.html"):
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
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((11, 7)))
    terminal = io.StringIO()
    view = TerminalView(terminal)
    first, *_, last = some_states("abc")
    view.draw(first)
    view.draw(last)
    view.close()
    assert terminal.getvalue() == (
        "step 0 of 24, 100% masked\n\x1b[2m░░░\x1b[0m\n"
        "\x1b[2F\x1b[Jstep 24 of 24, 0% masked\nabc\n\x1b[2F\x1b[J"
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


def test_the_noise_level_of_a_state_is_the_share_of_tokens_that_its_time_has_noised():
    schedule = Geometric(1e-3, 6.0)
    sampling = Sampling(steps=4, grid="cosine", t_min=0.01)
    steps = np.array([0, 1, 3, 4])
    times = 0.01 + 0.99 * np.cos(np.pi / 2 * steps / 4)
    noised = 1.0 - np.exp(-(1e-3 ** (1 - times)) * 6.0**times)
    for graph, expected in ((Uniform(5), [*noised[:3], 0.0]), (Absorbing(5), None)):
        sampler = DiffusionSampler(types.SimpleNamespace(graph=graph, schedule=schedule))
        levels = sampler.noise_levels(steps, sampling.functions())
        if expected is None:
            assert levels is None  # its masks are counted
        else:
            np.testing.assert_allclose(levels, expected, rtol=1e-5)


# --- frames


def text_in(frame):
    return "\n".join("".join(cell.character for cell in line) for line in frame.lines)


def test_frames_break_lines_between_words_and_alike_in_every_state():
    text = " ".join(["word"] * 40) + "\n\n  indented " + "x" * 100 + "\n東京\ttab"
    states = some_states(text, known=5)
    frames = Animation(states).frames()
    lines = text_in(frames[-1]).split("\n")
    assert lines[:3] == [" ".join(["word"] * 14) + " "] * 2 + [" ".join(["word"] * 12)]
    assert lines[3:5] == ["", "  indented "] and lines[5] == "x" * 72 and lines[6] == "x" * 28
    assert lines[7] == "東京·tab"
    kinds = [{cell.kind for line in frame.lines for cell in line} for frame in frames]
    assert kinds[0] == {"known", "masked"} and kinds[3] == {"known", "masked", "new", ""}
    assert kinds[-1] == {"known", ""}
    for frame, state in zip(frames, states, strict=True):
        assert frame.caption == state.caption(0) and frame.noise == state.noise[0]
        masked = {cell.position for line in frame.lines for cell in line if cell.kind == "masked"}
        assert masked == set(np.flatnonzero(state.is_masked[0]))


def test_a_masked_token_is_as_wide_as_what_it_becomes():
    words = types.SimpleNamespace(
        vocab_size=3, decode="".join, pieces=lambda row: [[" ab", "c", "\n", "░"][i] for i in row]
    )
    tokens = np.array([[1, 0, 2, 0]])
    states = [
        State(0, 1, np.full((1, 4), 3), np.zeros((1, 4), bool), words),
        State(1, 1, tokens, np.zeros((1, 4), bool), words),
    ]
    first, last = Animation(states).frames()
    assert text_in(last) == "c ab\n ab"
    shape = [[(cell.kind, cell.position) for cell in line] for line in first.lines]
    masked = [("masked", 0), ("", 1), ("masked", 1), ("masked", 1), ("masked", 2)]
    assert shape == [masked, [("", 3), ("masked", 3), ("masked", 3)]]


@pytest.mark.parametrize("uniform", [False, True])
def test_a_gif_begins_at_noise_and_plays_once(tmp_path, uniform):
    image = pytest.importorskip("PIL.Image", reason="Pillow comes with matplotlib, of [plot]")
    states = some_states("some text of a few words " * 6, known=4, uniform=uniform)
    with image.open(Animation(states, title="A <title>").save(tmp_path / "a.GIF")) as gif:
        assert gif.n_frames == len(states) and "loop" not in gif.info
        shown, pictures = [], []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append(gif.info["duration"])
            pictures.append(np.asarray(gif.convert("RGB"), int))
        assert shown == [800, *[400] * 7, 3000]
    bar = pictures[0][61, 24:-24]  # its length is the share that is noise
    for state, picture in zip(states, pictures):
        is_bar = (np.abs(picture[61, 24:-24] - bar[0]) < 24).all(axis=-1)
        expected = round(state.noise[0] * len(bar))
        assert abs(is_bar.sum() - expected) <= 1
    assert (pictures[0] != pictures[-1]).any(axis=-1).mean() > 0.05


def test_an_svg_shows_each_state_once_and_its_texts_as_they_are(tmp_path):
    states = some_states(HOSTILE, known=3)
    show(states, title=HOSTILE, path=tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    groups = root.findall("svg:g", space)
    assert [group.get("visibility") for group in groups] == ["hidden"] * 8 + ["visible"]
    times = [group.find("svg:animate", space) for group in groups]
    spans = [(one.get("values"), one.get("keyTimes").split(";")) for one in times]
    assert spans[0][0] == "visible;hidden" and spans[-1][0] == "hidden;visible"
    assert all(values == "hidden;visible;hidden" for values, _ in spans[1:-1])
    assert [t[1] for _, t in spans[1:]] == [spans[0][1][1], *[t[2] for _, t in spans[1:-1]]]
    assert all(one.get("fill") == "freeze" and one.get("repeatCount") is None for one in times)
    captions = [group.find("svg:text[@class='head']", space).text for group in groups]
    assert captions == [state.caption(0) for state in states]
    drawn = "".join(text.text for text in groups[-1].findall("svg:text", space)[1:])
    kept = [c for c in HOSTILE if c.isprintable() and c != " "]
    assert [c for c in drawn if c not in " ·"] == kept
    file = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<script" not in file and root.find(".//svg:title", space).text == HOSTILE


def test_an_ending_of_no_animation_is_refused_before_any_work(tmp_path, monkeypatch):
    with says("'a.webm' has none of the endings of an animation, .html, .gif, .svg; give one"):
        show(iter([]), path=tmp_path / "a.webm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with says("a .gif is drawn with matplotlib, which is not installed; pip install"):
        show(iter([]), path=tmp_path / "a.gif")


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
        ("", -1, 0),  # played, once
        ("#state=0", 0, 0),
        ("#state=4&sample=1", 4, 1),
        ("#state=-2", -2, 0),
        ("#state=0&play", -1, 0),  # played to its end
        ("#state=x&sample=9", -1, 0),
    ):
        document = browse(animation.html, fragment)
        assert text_of(document, "text") == states[state].texts[n], fragment
        assert text_of(document, "count") == states[state].caption(n)
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
    document = browse(Animation(states).html.replace("</body>", acts), "#state=-1")
    assert "data-errors" not in document
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', document)[1]))
    assert seen == [
        f"count: {states[-2].caption(0)}",
        "count: step 24 of 24, 0% masked",
        f'about: position 0 · token {ord("s")} · "s" · given',
        f"about: position 3 · masked · settled by step {settled(states, 3)}",
        f"text: {states[0].texts[0]}",
        "order",
        "Play",
    ]


def test_the_page_begins_at_noise_and_plays_once(browse):
    watch = """<script>{
      const seen = [], get = id => document.getElementById(id);
      const note = () => seen.push([get("count").textContent, get("play").ariaLabel]);
      note();
      new MutationObserver(note).observe(get("count"), {childList: true});
      setInterval(() => { document.body.dataset.seen = JSON.stringify(seen);
        if (get("play").ariaLabel === "Play again" && seen.length < 14) get("play").click();
      }, 9000);
    }</script></body>"""
    for uniform, kind in ((False, "masked"), (True, "noise")):
        states = some_states("some text", uniform=uniform, updates=10)
        document = browse(Animation(states).html.replace("</body>", watch))
        seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', document)[1]))
        captions = [state.caption(0) for state in states]
        # At its end once more: what was new is new no more. Then the button plays it again.
        assert [one for one, _ in seen] == [*captions, captions[-1], *captions, captions[-1]]
        assert seen[0][0] == f"step 0 of 30, 100% {kind}"


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
    }}, 9000);</script></body></html>"""
    document = browse(page)
    assert text_of(document, "found") == HOSTILE
    assert 150 < int(re.search(r'data-height="(\d+)"', document)[1]) <= 680
    assert "data-owned" not in document
