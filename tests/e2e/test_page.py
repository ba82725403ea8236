"""The page in a real browser: what it shows, by keyboard, on a phone, with a token, and nothing but its own files.

The browser is a Chromium of the system, or Playwright's own (``python -m playwright install chromium``).
"""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from service_process import running_service
from tiny_jobs import cache_config, noise_samples, write_tar
from tiny_store import tiny_manifest, tiny_store, view_data
from training_world import World, make_world

from feature_store import connect
from teacher_service.cache.job import cache

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """Without one these tests are skipped, and say how to install it."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        if executable is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install the system's, or run python -m playwright install chromium")
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("page"), skip=[(1, 1)])


@pytest.fixture(scope="module")
def url(world):
    with running_service(world.store, "--tars", *world.tars) as running:
        yield running.url


@pytest.fixture
def page(browser: Browser):
    """A page that must stay without an error and without a request to anywhere else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.problems, page.addresses = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: page.addresses.append(request.url))
    yield page
    context.close()


def is_painted(page: Page, selector: str) -> bool:
    """Whether a picture arrived and is not of one colour."""
    page.wait_for_function("s => document.querySelector(s)?.naturalWidth > 0", arg=selector)
    return page.evaluate(
        """selector => {
            const image = document.querySelector(selector), canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
            return new Set(pixels).size > 1;
        }""",
        selector,
    )


def test_page_shows_the_store_when_opened(page, url):
    page.goto(url)
    expect(page.locator("#grid button")).to_have_count(14)
    expect(page.locator("#teacher")).to_have_text("test_vit")
    expect(page.locator("#progress-number")).to_have_text("75 %")
    expect(page.locator("#progress-text")).to_contain_text("3 of 4 tar views committed")
    expect(page.locator("#store")).to_contain_text("38 of 52")  # rows: two views of 13, one of 12
    expect(page.locator("#quarantine")).to_contain_text("a009")
    expect(page.locator("#quarantine")).to_contain_text("not an image")
    expect(page.locator("#grid button").nth(9)).to_be_disabled()
    assert page.problems == []
    assert {address.split("/")[2] for address in page.addresses if not address.startswith("blob:")} == {
        url.removeprefix("http://")
    }


def test_sample_is_shown_with_view_colours_classes_and_neighbours_when_chosen(page, url):
    page.goto(url)
    page.locator("#grid button").nth(2).click()
    expect(page.locator("#detail strong")).to_have_text("a002")
    assert is_painted(page, "#detail figure:first-child img")
    assert is_painted(page, "#detail figure:last-child img")
    expect(page.locator(".classes li")).to_have_count(4)
    near = page.locator(".near button")
    expect(near).to_have_count(8)
    key = near.first.get_attribute("title")
    near.first.click()
    expect(page.locator("#detail strong")).to_have_text(key)
    assert key != "a002"
    assert page.problems == []


def test_other_tars_and_views_are_shown_when_chosen(page, url):
    page.goto(url)
    page.get_by_role("combobox", name="Tar").select_option("train-1.tar")
    expect(page.locator("#grid button")).to_have_count(12)
    expect(page.locator("#grid button").first).to_have_attribute("title", "b000")
    page.get_by_role("combobox", name="View").select_option("1")
    expect(page.locator("#grid .blank")).to_have_count(12)  # this view is not committed
    assert page.problems == []


def test_page_is_used_by_keyboard_alone_when_tabbed_through(page, url):
    page.goto(url)
    expect(page.locator("#grid button")).to_have_count(14)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.locator("#grid button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#detail strong")).to_have_text("a001")
    expect(page.locator("#grid button").nth(1)).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_controls_have_names_when_read_aloud(page, url):
    page.goto(url)
    expect(page.locator("#grid button")).to_have_count(14)
    page.locator("#grid button").first.click()
    expect(page.locator(".near button")).to_have_count(8)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, progress, img, svg[role]")]
            .filter(each => !each.closest("[hidden]"))
            .filter(each => !(each.ariaLabel || each.getAttribute("aria-labelledby") || each.labels?.length
                || each.hasAttribute("alt") || each.textContent.trim()))
            .map(each => each.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("[...document.querySelectorAll('h1, h2')].map(each => each.textContent)") == [
        "Teacher features", "Progress", "Throughput", "Store", "Samples", "Quarantine",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [320, 375, 768])
def test_page_fits_without_scrolling_sideways_when_narrow(page, url, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(url)
    page.locator("#grid button").first.click()
    expect(page.locator(".near button")).to_have_count(8)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    small = page.evaluate(
        """() => [...document.querySelectorAll("button:enabled, select")].map(each => each.getBoundingClientRect())
            .filter(box => box.width && Math.min(box.width, box.height) < 24).length"""
    )
    assert small == 0  # WCAG 2.5.8
    assert page.problems == []


def test_page_asks_for_a_token_and_keeps_it_in_its_tab_when_the_service_needs_one(page, world, tmp_path, capfd):
    from teacher_service.cli import main

    tokens = tmp_path / "tokens.jsonl"
    main(["token", "create", "--name", "reader", "--file", str(tokens)])
    token = capfd.readouterr().out.strip()
    with running_service(world.store, "--tokens", str(tokens)) as running:
        page.goto(running.url)
        field = page.get_by_label("Access token")
        expect(field).to_be_focused()
        expect(page.locator("main")).to_be_hidden()
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#token-note")).to_contain_text("Refused")
        field.fill(token)
        field.press("Enter")
        expect(page.locator("#grid button")).to_have_count(14)
        page.locator("#grid button").first.click()
        assert is_painted(page, "#detail figure img")
        page.reload()
        expect(page.locator("#grid button")).to_have_count(14)
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        assert not any(token in address for address in page.addresses)


class StrippingProxy(BaseHTTPRequestHandler):
    """Serves a service below a path, as Jupyter's proxy and nginx's locations do: the service does not see the path."""

    service = ""
    prefix = "/user/ada/proxy/8000"

    def do_GET(self) -> None:
        if not self.path.startswith(f"{self.prefix}/"):
            return self.send_error(404)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        request = Request(self.service + self.path.removeprefix(self.prefix), headers=headers)
        try:
            answer = urlopen(request, timeout=20)
        except HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            self.send_response(answer.status)
            for name in ("Content-Type", "Content-Security-Policy"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        return None

    def log_message(self, *_) -> None:
        """Nothing."""


@contextmanager
def behind_a_prefix(service: str):
    """The service's URL behind a proxy that strips a path."""
    handler = type("Proxy", (StrippingProxy,), {"service": service})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}{handler.prefix}"
        proxy.shutdown()


def test_page_works_when_it_is_behind_a_path_prefix(page, url):
    with behind_a_prefix(url) as prefixed:
        page.goto(f"{prefixed}/")
        expect(page.locator("#grid button")).to_have_count(14)
        expect(page.locator("#teacher")).to_have_text("test_vit")
        page.locator("#grid button").nth(2).click()
        expect(page.locator("#detail strong")).to_have_text("a002")
        assert is_painted(page, "#detail figure:first-child img")
        asked = {address for address in page.addresses if not address.startswith("blob:")}
        assert {f"{prefixed}/", f"{prefixed}/page.css", f"{prefixed}/page.js"} < asked
        assert all(address.startswith(f"{prefixed}/") for address in asked)
    assert page.problems == []


def test_page_keeps_tokens_of_services_apart_when_they_share_an_origin(page, world, tmp_path, capfd):
    from teacher_service.cli import main

    tokens = tmp_path / "tokens.jsonl"
    main(["token", "create", "--name", "reader", "--file", str(tokens)])
    token = capfd.readouterr().out.strip()
    with running_service(world.store, "--tokens", str(tokens)) as running, behind_a_prefix(running.url) as prefixed:
        page.goto(f"{prefixed}/page.css")  # of the same origin
        page.evaluate("sessionStorage.setItem('token', 'of another service')")
        page.goto(f"{prefixed}/")
        expect(page.get_by_label("Access token")).to_be_focused()
        expect(page.locator("#token-note")).not_to_contain_text("Refused")
        page.get_by_label("Access token").fill(token)
        page.get_by_label("Access token").press("Enter")
        expect(page.locator("#grid button")).to_have_count(14)


def test_client_reads_rows_when_the_service_is_behind_a_path_prefix(url):
    with behind_a_prefix(url) as prefixed:
        assert connect(prefixed).manifest.identity() == connect(url).manifest.identity()


def test_page_follows_when_more_is_committed(page, tmp_path):
    world = make_world(tmp_path / "world", skip=[(0, 1), (1, 0), (1, 1)])
    whole = make_world(tmp_path / "whole")
    with running_service(world.store, "--refresh-seconds", "0.2") as running:
        page.goto(running.url)
        expect(page.locator("#progress-number")).to_have_text("25 %")
        complete(world.store, whole.store)
        expect(page.locator("#progress-number")).to_have_text("100 %")
        expect(page.locator("#status")).to_have_text("complete")
        expect(page.locator("#unit option:enabled")).to_have_count(2)
    assert page.problems == []


def test_page_keeps_the_view_and_shows_its_samples_when_the_store_gets_views(page, tmp_path):
    manifest = replace(tiny_manifest(), logits_codec=None)
    store = tiny_store(tmp_path / "store", manifest, units=())
    store.write_unit(1, 0, view_data(manifest, 1, range(2)))
    with running_service(store.path, "--refresh-seconds", "0.2") as running:
        page.goto(running.url)
        page.select_option("#view", "1")
        expect(page.locator("#grid button:enabled")).to_have_count(3)
        grown = store.grow(replace(manifest, num_views=3))
        expect(page.locator("#view option")).to_have_count(3)
        expect(page.locator("#view")).to_have_value("1")
        page.select_option("#view", "2")
        expect(page.locator("#grid .blank")).to_have_count(3)  # not yet
        grown.write_unit(1, 2, view_data(grown.manifest, 1, range(2, 3)))
        expect(page.locator("#grid button:enabled")).to_have_count(3)
        page.locator("#grid button").nth(0).click()
        expect(page.locator("#detail strong")).to_have_text("key/1-0")
    assert page.problems == []


def test_page_shows_what_is_committed_when_it_is_far_down_a_long_list(page, tmp_path):
    small = tiny_manifest()
    tars = [replace(small.tars[0], name=f"tar-{unit}.tar", samples=5) for unit in range(1100)]
    manifest = replace(small, tars=tuple(tars))
    store = tiny_store(tmp_path / "store", manifest, units=(1050,))
    with running_service(store.path) as running:
        page.goto(running.url)
        expect(page.locator("#grid button:enabled")).to_have_count(5)
        expect(page.locator("#unit option")).to_have_count(1100)
        expect(page.locator("#unit")).to_have_value("1050")
        expect(page.locator("#strip i")).to_have_count(367)  # of three tars each
        expect(page.locator("#strip i.some")).to_have_count(1)
    assert page.problems == []


def complete(store: Path, whole: Path) -> None:
    """Give a store what a whole one of the same settings has: objects first, commit records last."""
    for records in (False, True):
        for file in sorted(whole.rglob("*")):
            name = file.relative_to(whole)
            if file.is_file() and (name.parts[0] == "commits") == records and not (store / name).exists():
                (store / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, store / name)


def test_scripts_of_others_do_not_run_when_injected(page, url):
    page.goto(url)
    expect(page.locator("#grid button")).to_have_count(14)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = 1";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in problem for problem in page.problems)


def test_names_that_are_markup_are_shown_as_they_are(page, tmp_path, tiny_swin):
    hostile = "<img src=x onerror=alert(1)>\u202e'\"&amp;-"
    shown = hostile.replace("\u202e", r"\u202e")  # an override of the direction of writing is told, not obeyed
    samples = noise_samples(hostile, 3)
    samples[1]["png"] = b"\x89PNG broken"
    samples[2]["__key__"] = "long " * 40
    tar = write_tar(tmp_path / "<b onclick=alert(2)>.tar", samples)
    store = tmp_path / "store.zarr"
    cache(cache_config([tar], tiny_swin, store))
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    with running_service(store, "--tars", tar) as running:
        page.goto(running.url)
        expect(page.locator("#quarantine")).to_contain_text(f"{shown}001")
        expect(page.locator("#unit")).to_contain_text("<b onclick=alert(2)>.tar")
        page.locator("#grid button").nth(0).click()
        expect(page.locator("#detail strong")).to_have_text(f"{shown}000")
        assert is_painted(page, "#detail figure:first-child img")
        page.locator("#grid button").nth(2).click()
        expect(page.locator("#detail strong")).to_have_text("long " * 40)
        assert page.evaluate("document.querySelectorAll('[src=x], [onerror], [onclick]').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.problems == []
