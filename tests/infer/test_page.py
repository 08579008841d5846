"""The server's page in a browser: headless Chromium against the real server."""

import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browsing import TIMEOUT_MS, Column, Watch, chromium, expect
from served import KEYS, TOKENIZER, served, wait

from metastate.config import MetaStateConfig
from metastate.infer import server as server_module
from metastate.infer.generate import generate
from metastate.infer.inspect import inspect_prompt
from metastate.infer.sampling import Sampler, SamplingConfig
from tiny_models import tiny

PAGE = Path(server_module.__file__).parent / "page"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def make(readout, memory_heads=None):
    """A model of bytes that writes printable ASCII only, so that a token is a character."""
    model = tiny(memory_heads=memory_heads, meta_state=MetaStateConfig(readout=readout)).eval()
    with torch.no_grad():
        model.embedding.weight[:, 0] = 1  # the first channel of ln_out is a bias for the head
        model.ln_out.weight[0], model.ln_out.bias[0] = 0, 1
        model.head.weight[:, 0] = torch.tensor([0.0 if 32 < i < 127 else -1e4 for i in range(256)])
    return model


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    with served(tmp_path_factory.mktemp("states"), make("both")) as server:
        yield server


@pytest.fixture
def visit(browser):
    """Open the page: visit(server, **options of the browser's context)."""
    watches, contexts = [], []

    def open_page(server, **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.watch = Watch(page, server.url)
        watches.append(page.watch)
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("tiny")
        return page

    yield open_page
    for watch in watches:
        watch.check()
    for context in contexts:
        context.close()


def greedy(server, prompt, max_tokens, state=None):
    sampling = SamplingConfig(temperature=0)
    run = generate(
        server.model, TOKENIZER, prompt, state=state, sampling=sampling, max_tokens=max_tokens
    )
    return "".join(run)


COUNT_TEXT_CHANGES = """
() => {
  const text = document.querySelector('.text');
  window.lengths = [];
  new MutationObserver(() => window.lengths.push(text.textContent.length))
    .observe(text, {childList: true, subtree: true, characterData: true});
}
"""


@pytest.fixture
def slowly(monkeypatch):
    """Let a token take its time: pieces that are ready together come together."""
    sample = Sampler.sample

    def wait_and_sample(self, logits):
        time.sleep(0.04)
        return sample(self, logits)

    monkeypatch.setattr(Sampler, "sample", wait_and_sample)


def test_a_text_streams_and_goes_on(server, visit, slowly):
    page = visit(server)
    column = Column(page, "A")
    page.evaluate(COUNT_TEXT_CHANGES)
    column.run("once", Temperature=0, Most_tokens=30)
    written = greedy(server, "once", 60)
    assert column.text == "once" + written[:30] and column.prompt.input_value() == ""
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) >= 5 and all(a <= b for a, b in pairwise(lengths))
    column.press("Run")  # nothing added: the stored state goes on as if it had never stopped
    expect(column.root.locator(".text")).to_have_text("once" + written)
    column.wait()
    first, second = page.watch.bodies("v1/completions")
    assert first["prompt"] == "once" and "state" not in first
    assert second["prompt"] == "" and second["state"].startswith("state-")


def test_every_setting_reaches_the_server(server, visit):
    page = visit(server)
    settings = {"Temperature": 0.7, "Top-p": 0.9, "Top-k": 40, "Penalty": 1.2, "Seed": 5}
    Column(page, "A").run("ab", **settings, Most_tokens=8)
    (body,) = page.watch.bodies("v1/completions")
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    assert [body[name] for name in names] == list(settings.values())
    assert (body["max_tokens"], body["model"], body["stream"]) == (8, "tiny", True)
    said = page.locator(".summary").inner_text()
    assert said == "temperature 0.7, top-p 0.9, top-k 40, penalty 1.2, seed 5, 8 tokens"


@pytest.mark.parametrize("how", ["button", "keyboard"])
def test_stop_stops_and_the_text_can_go_on(server, visit, slowly, how):
    page = visit(server)
    column = Column(page, "A")
    column.set(Temperature=0, Most_tokens=4000)
    column.prompt.fill("ab")
    column.prompt.press("Control+Enter")
    expect(column.root.locator(".text")).to_have_text(re.compile(".{10}"))
    if how == "button":
        column.press("Stop")
    else:
        page.keyboard.press("Escape")
    column.wait("stopped")
    wait(lambda: server.engine.num_running == 0)
    text = column.text
    assert 10 <= len(text) < 4002 and text == "ab" + greedy(server, "ab", len(text) - 2)
    column.run("cd", Most_tokens=5)  # no state is stored there: the text is read again
    assert page.watch.bodies("v1/completions")[1]["prompt"] == text + "cd"
    assert column.text == text + "cd" + greedy(server, text + "cd", 5)


def test_a_fork_is_a_second_column_from_the_stored_state(server, visit):
    page = visit(server)
    a = Column(page, "A").run("once", Temperature=0, Most_tokens=20)
    a.run("and", Most_tokens=20)
    whole = a.text
    a.cut(30)  # the state behind 24 characters is stored; 6 are read again
    assert "30 of 47 characters (6 of them are read again)" in a.root.inner_text()
    assert page.locator(".beyond").all_inner_texts() == [whole[30:]]
    a.press("Fork here")
    b = Column(page, "B")
    b.root.wait_for()
    assert b.text == whole[:30] and b.root.locator(".shared").inner_text() == whole[:30]
    b.set(Temperature=2, Seed=3)
    b.run(Most_tokens=40)
    assert len(b.text) == 70 and b.text.startswith(whole[:30])
    assert a.text == whole and a.root.get_by_label("Temperature").input_value() == "0"
    last = page.watch.bodies("v1/completions")[-1]
    assert last["prompt"] == whole[24:30] and last["temperature"] == 2 and last["seed"] == 3
    forked = [r for r in page.watch.requests if r.url.endswith("/fork")]
    assert len(forked) == 1 and last["state"] not in forked[0].url
    boxes = [c.root.bounding_box() for c in (a, b)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side
    b.press("Close")
    assert page.get_by_role("article").count() == 1


def test_a_fork_of_the_whole_text_goes_on_exactly(server, visit):
    page = visit(server)
    a = Column(page, "A").run("once", Temperature=0, Most_tokens=20)
    a.press("Fork here")
    b = Column(page, "B").run(Most_tokens=20)
    a.run(Most_tokens=20)
    assert a.text == b.text == "once" + greedy(server, "once", 40)


CANVAS_COLOURS = """
canvases => canvases.map(canvas => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
})
"""


def test_the_inspector_shows_what_tokens_wrote(server, visit):
    page = visit(server)
    a = Column(page, "A").run("a text", Temperature=0, Most_tokens=10)
    a.press("Look inside")
    page.locator("canvas.map").first.wait_for()
    maps = page.locator("canvas.map")
    assert maps.count() == 2 * 2 * 2  # S and M, layers, heads
    assert all(n > 4 for n in maps.evaluate_all(CANVAS_COLOURS))
    assert page.locator("canvas.chart").evaluate_all(CANVAS_COLOURS)[0] > 4
    assert "norm" in maps.first.get_attribute("aria-label")
    found = inspect_prompt(server.model, TOKENIZER, a.text)
    tokens = page.locator(".token")
    assert tokens.count() == len(found["tokens"]) == 17

    def shown():
        return tokens.evaluate_all("e => e.map(x => Number(x.style.getPropertyValue('--wrote')))")

    def expected(name, layers):
        records = [found["layers"][i][name]["changes"] for i in layers]
        total = torch.tensor(records).square().sum((0, 2)).sqrt()
        return (100 * (total - total.min()) / (total.max() - total.min())).tolist()

    assert shown() == pytest.approx(expected("S", [0, 1]), abs=0.01)
    page.get_by_role("combobox", name="Matrix").select_option("M")
    page.get_by_role("combobox", name="Layer").select_option("2")
    assert shown() == pytest.approx(expected("M", [1]), abs=0.01)
    assert "layer 2" in page.locator("canvas.chart").get_attribute("aria-label")
    page.locator(".tokens").press("ArrowRight")
    page.locator(".tokens").press("ArrowRight")
    assert f"Token 2 of 17, id {ord('a')}" in page.locator(".detail").inner_text()
    state, cache = (found["state"][name] for name in ("state_bytes", "cache_bytes"))
    for size in (state, cache):
        assert f"{size:,} bytes" in page.locator(".sizes").inner_text()


def test_a_model_without_a_meta_state_is_not_given_one(browser, visit, tmp_path):
    with served(tmp_path, make("encoding")) as server:
        page = visit(server)
        page.get_by_label("Text to read token by token").fill("ab")
        page.get_by_label("Text to read token by token").press("Control+Enter")
        page.locator("canvas.map").first.wait_for()
        assert page.locator("canvas.map").count() == 2 * 2
        assert page.get_by_role("combobox", name="Matrix").locator("option").all_inner_texts() == [
            "S"
        ]
        said = page.locator("#inside").inner_text()
        assert "keep no meta state M" in said and "asks S a second time" in said


def test_the_inspector_shows_the_surprise_memory(browser, visit, tmp_path):
    with served(tmp_path, make("encoding", memory_heads=1)) as server:
        page = visit(server)
        page.get_by_label("Text to read token by token").fill("a text")
        page.get_by_label("Text to read token by token").press("Control+Enter")
        page.locator("canvas.map").first.wait_for()
        assert page.locator("canvas.map").count() == 2 * 2 + 1
        label = page.locator("canvas.map").last.get_attribute("aria-label")
        assert label.startswith("M of the surprise memory, head 1: norm") and " of 16, " in label
        page.get_by_role("combobox", name="Layer").select_option("2")
        page.get_by_role("combobox", name="Matrix").select_option("memory")
        assert page.get_by_role("combobox", name="Layer").is_disabled()
        found = inspect_prompt(server.model, TOKENIZER, "a text")["memory"]["M"]
        shown = page.locator(".token").evaluate_all(
            "e => e.map(x => Number(x.style.getPropertyValue('--wrote')))"
        )
        wrote = torch.tensor(found["changes"])[:, 0]
        wrote = 100 * (wrote - wrote.min()) / (wrote.max() - wrote.min())
        assert shown == pytest.approx(wrote.tolist(), abs=0.01)
        said = page.locator("canvas.chart").get_attribute("aria-label")
        assert said.startswith("Norm of M of the surprise memory over the tokens. head 1: from")
        assert "layer 2" not in said
        page.get_by_role("combobox", name="Matrix").select_option("S")
        assert "layer 2" in page.locator("canvas.chart").get_attribute("aria-label")


def test_states_are_inspected_taken_away_brought_back_and_deleted(server, visit, tmp_path):
    page = visit(server)
    rows = page.locator("#state-list li")
    page.on("dialog", lambda dialog: dialog.accept())
    rows.first.wait_for()  # the list has come
    if page.get_by_role("button", name="Delete all").is_visible():
        page.get_by_role("button", name="Delete all").click()
    expect(rows).to_have_text([re.compile("No state is stored")])
    Column(page, "A").run("once", Temperature=0, Most_tokens=20)
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("24 tokens")
    rows.get_by_role("button", name="Inspect").click()
    page.locator("canvas.map").first.wait_for()
    assert page.locator(".token").count() == 0
    with page.expect_download() as download:
        rows.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "a.state")
    assert (tmp_path / "a.state").stat().st_size > 1000
    rows.get_by_role("button", name="Delete").click()
    expect(rows).to_have_text([re.compile("No state is stored")])
    page.get_by_label("Upload a state").set_input_files(tmp_path / "a.state")
    expect(rows).to_contain_text("24 tokens")
    rows.get_by_role("button", name="Continue").click()
    b = Column(page, "B")
    assert b.text == "" and "24 tokens" in b.status
    b.run(Temperature=0, Most_tokens=20)
    assert "once" + greedy(server, "once", 40) == Column(page, "A").text + b.text


HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def test_html_that_the_model_writes_is_text(server, visit, monkeypatch):
    page = visit(server)
    ids = iter(HOSTILE.encode())
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: next(ids))
    a = Column(page, "A").run("<b>bold</b> ", Most_tokens=len(HOSTILE))
    a.press("Look inside")
    page.locator("canvas.map").first.wait_for()
    assert a.text == "<b>bold</b> " + HOSTILE
    assert HOSTILE in page.locator(".tokens").inner_text()
    assert page.locator("b, img, main script").count() == 0 and page.title() == "metastate"


def test_errors_are_told_in_words(server, visit):
    page = visit(server)
    page.watch.errors_wanted = True  # the browser logs every answer that is a refusal
    column = Column(page, "A")
    column.set(Most_tokens=9999)
    column.prompt.fill("kept")
    column.press("Run")
    alert = column.root.get_by_role("alert")
    expect(alert).to_contain_text("max_tokens is 9999; at most 4096 are allowed")
    assert column.prompt.input_value() == "kept"  # nothing typed is lost
    column.run("kept", Most_tokens=5)
    assert not alert.is_visible()
    page.get_by_label("Text to read token by token").fill("x" * 600)
    page.get_by_role("button", name="Read").click()
    alert = page.locator("#inspect-problem")
    expect(alert).to_contain_text("600 tokens; the inspector reads 1 to 511")
    page.get_by_label("Upload a state").set_input_files(
        {"name": "a", "mimeType": "application/octet-stream", "buffer": b"no state"}
    )
    expect(page.locator("#states-problem")).to_contain_text("no whole safetensors file")
    text = column.text
    for press, again in (("Run", column.run), ("Fork here", lambda: column.press("Fork here"))):
        for stored in server.store.list("open"):
            server.store.delete("open", stored.id)
        column.press(press)
        alert = column.root.get_by_role("alert")
        expect(alert).to_contain_text("deleted, never there, or is of other weights. Try again")
        again()
        expect(alert).to_be_hidden()
    body = page.watch.bodies("v1/completions")[-1]
    assert body["prompt"] == text and "state" not in body
    assert Column(page, "B").text == column.text


def test_what_is_cleared_stays_away(server, visit, slowly):
    page = visit(server)
    column = Column(page, "A")
    column.set(Most_tokens=4000)
    column.prompt.fill("ab")
    column.press("Run")
    expect(column.root.locator(".text")).to_have_text(re.compile(".{10}"))
    column.press("Clear")
    column.wait("stopped")
    wait(lambda: server.engine.num_running == 0)
    assert column.text == "" and column.root.get_by_role("slider").count() == 0
    column.run("cd", Most_tokens=5)
    assert page.watch.bodies("v1/completions")[-1]["prompt"] == "cd"


def test_no_cut_goes_through_a_character(server, visit):
    page = visit(server)
    a = Column(page, "A").run("🙂🙂", Temperature=0, Most_tokens=5)
    a.cut(3)  # in UTF-16, as a browser counts, inside the second one
    a.press("Fork here")
    b = Column(page, "B")
    assert b.text == "🙂🙂"
    b.run(Temperature=0, Most_tokens=5)
    assert b.text == a.text


def test_a_stream_that_breaks_off_is_told(server, visit, monkeypatch):
    page = visit(server)
    ids = iter(b"abc")
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: next(ids))
    column = Column(page, "A")
    column.prompt.fill("ab")
    column.press("Run")
    alert = column.root.get_by_role("alert")
    expect(alert).to_contain_text("the server made a mistake")
    assert column.text == "ababc"


def test_the_key_stays_in_the_tab(browser, tmp_path):
    with served(tmp_path, make("both"), keys=KEYS) as server:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(server.url)
        alert = page.locator("#problem")
        expect(alert).to_contain_text("This server wants an API key")
        page.get_by_label("API key").fill(KEYS[0])
        page.get_by_label("API key").press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        assert not alert.is_visible() and KEYS[0] not in page.url
        column = Column(page, "A").run("ab", Temperature=0, Most_tokens=5)
        assert len(column.text) == 7
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")
        other = context.new_page()
        other.goto(server.url)
        expect(other.locator("#problem")).to_contain_text("API key")
        context.close()


def test_a_phone_needs_no_sideways_scrolling(server, visit):
    page = visit(server, viewport={"width": 390, "height": 844}, has_touch=True)
    a = Column(page, "A").run("w" * 300, Temperature=0, Most_tokens=20)
    a.press("Fork here")
    Column(page, "B").run(Most_tokens=20)
    a.press("Look inside")
    page.locator("canvas.map").first.wait_for()
    page.get_by_text("As numbers").click()
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes == [390, 390]
    wide = page.evaluate(
        "[...document.querySelectorAll('main *:not(.scroll *)')]"
        ".filter(e => e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    boxes = [Column(page, name).root.bounding_box() for name in "AB"]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"]  # one under the other


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_and_can_be_read(server, visit, scheme):
    page = visit(server, color_scheme=scheme)
    style = "getComputedStyle(document.documentElement)"

    def colour(name):
        text = page.evaluate(f"{style}.getPropertyValue('--{name}')").strip()
        return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shown = [int(n) / 255 for n in re.findall(r"\d+", back)]
    assert shown == pytest.approx(colour("back"))
    assert (luminance(shown) < 0.05) if scheme == "dark" else (luminance(shown) > 0.8)
    for text, behind in (
        *((text, behind) for text in ("text", "quiet") for behind in ("back", "panel")),
        ("text", "tint"),
        ("quiet", "tint"),
        ("on-accent", "accent"),
        ("problem", "problem-back"),
    ):
        assert contrast(colour(text), colour(behind)) >= 4.5, (text, behind)
    assert contrast(colour("accent"), colour("panel")) >= 3  # focus rings and bars


NAMELESS = """
() => [...document.querySelectorAll('button, input, select, textarea, canvas, summary')]
  .filter(e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim()))
  .map(e => e.outerHTML)
"""


def test_it_works_from_the_keyboard_and_everything_has_a_name(server, visit):
    page = visit(server)
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        seen.append(
            page.evaluate("[document.activeElement.tagName, document.activeElement.className]")
        )
        assert outline == "solid", seen[-1]
    assert ["BUTTON", "run main"] in seen and ["TEXTAREA", "prompt"] in seen
    column = Column(page, "A")
    column.prompt.focus()
    page.keyboard.type("typed")
    page.keyboard.press("Control+Enter")
    column.wait()
    assert column.text.startswith("typed")
    column.root.get_by_role("slider").focus()
    page.keyboard.press("ArrowLeft")
    assert "204 of 205 characters" in column.root.inner_text()
    column.press("Look inside")
    page.locator("canvas.map").first.wait_for()
    assert page.evaluate(NAMELESS) == []
    assert page.get_by_role("log").get_attribute("aria-live") == "polite"


def test_a_strict_policy_holds(server):
    policy = server.client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'self'" in policy
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*\bsrc=)", html)
    for file in PAGE.iterdir():
        code = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|eval\(|@import", code)
        assert server.client.get(f"/page/{file.name}").status_code == 200
