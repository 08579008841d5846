"""A headless browser, and what the server's page looks like to the tests that drive it."""

import contextlib
import json
import re
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_MS = 60_000
SAYS_ITS_TOKENS = re.compile(r"\d tokens,")

expect.set_options(timeout=TIMEOUT_MS)


@contextlib.contextmanager
def chromium():
    """Yield a running browser of this machine; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Watch:
    """What a page did: requests, errors; `errors_wanted` where a test provokes refusals."""

    def __init__(self, page, url):
        self.page, self.url, self.errors_wanted = page, url, False
        self.errors, self.requests = [], []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request))

    def check(self):
        own = (f"{self.url}/", "data:", f"blob:{self.url}/")
        assert [r.url for r in self.requests if not r.url.startswith(own)] == []
        assert self.errors_wanted or self.errors == []

    def bodies(self, path):
        return [json.loads(r.post_data) for r in self.requests if r.url == f"{self.url}/{path}"]


class Column:
    """A column of the page, by its name."""

    def __init__(self, page, name):
        self.page, self.root = page, page.get_by_role("article", name=f"Column {name}", exact=True)
        self.prompt = self.root.get_by_label(re.compile("Prompt|Text to add"))

    @property
    def text(self):
        return self.root.locator(".text").inner_text() if self.has_text else ""

    @property
    def has_text(self):
        return bool(self.root.locator(".text span").count())

    @property
    def status(self):
        return self.root.locator(".status").inner_text()

    def press(self, name):
        self.root.get_by_role("button", name=name, exact=True).click()

    def set(self, **settings):
        if not self.root.locator(".settings").is_visible():
            self.root.get_by_text("Sampling", exact=False).first.click()
        for label, value in settings.items():
            self.root.get_by_label(label.replace("_", " "), exact=True).fill(str(value))

    def cut(self, at):
        self.root.get_by_role("slider").evaluate(
            "(e, at) => { e.value = at; e.dispatchEvent(new Event('input', {bubbles: true})); }", at
        )

    def run(self, prompt="", **settings):
        self.set(**settings)
        self.prompt.fill(prompt)
        self.press("Run")
        self.wait()
        return self

    def wait(self, said=SAYS_ITS_TOKENS):
        expect(self.root.locator(".status")).to_have_text(said)
