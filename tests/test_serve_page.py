"""The page of `cvt-pipeline serve` in a real browser, as people use it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline.labels.reviews import read_decisions, standing
from pipeline.storage import Storage
from tests.labelled_images import pictures
from tests.serving import NUM_IMAGES, Server, output, server, serving

__all__ = ["output", "server"]  # fixtures

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromium-driver, which Debian has as packages"
)
PATIENCE_S = 120
SCREENSHOTS = os.environ.get("CVT_TEST_SCREENSHOTS")  # a folder to look at them in


class Browser:
    """A Chromium without a window, and what is asked of it."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER or ""
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.add_argument("--window-size=1300,900")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(PATIENCE_S)

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.ready()

    def ready(self) -> None:
        self.until(
            "return document.querySelector('main').children.length > 0 "
            "&& !document.querySelector('main').hasAttribute('aria-busy')"
        )

    def until(self, script: str, *values: Any) -> Any:
        """What a script gives as soon as that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, PATIENCE_S, 0.05).until(
            lambda driver: driver.execute_script(script, *values)
        )

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def ids(self) -> list[str]:
        script = "return [...document.querySelectorAll('.grid .id')].map((it) => it.textContent)"
        found: list[str] = self.driver.execute_script(script)
        return found

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.driver.current_url).query)

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.driver.save_screenshot(f"{SCREENSHOTS}/{name}.png")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def faults(self) -> list[str]:
        """What axe finds that is serious."""
        import axe_core_python

        script = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
        self.driver.execute_script(script)
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; axe.run().then(r => done(r.violations))"
        )
        return [
            f"{it['id']}: {it['nodes'][0]['html']}"
            for it in found
            if it["impact"] in ("serious", "critical")
        ]


@pytest.fixture(scope="module")
def only_browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(only_browser: Browser) -> Iterator[Browser]:
    only_browser.driver.get("about:blank")
    only_browser.complaints()
    yield only_browser
    assert only_browser.complaints() == []


DROP = """
const [bytes, name, kind] = arguments, file = new File([new Uint8Array(bytes)], name, {type: "image/png"});
const data = new DataTransfer();
data.items.add(file);
if (kind === "paste") window.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
else for (const step of ["dragover", "drop"])
  document.body.dispatchEvent(new DragEvent(step, {dataTransfer: data, bubbles: true, cancelable: true}));
"""


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_an_image_that_is_given_finds_those_like_it(
    browser: Browser, server: Server, tmp_path: Path, way: str
) -> None:
    data = pictures(60)[4][1]
    browser.open(f"{server.address}/")
    assert f"{NUM_IMAGES} images" in browser.one("h1").text
    if way == "choose":
        (tmp_path / "mine.png").write_bytes(data)
        browser.one("#file").send_keys(str(tmp_path / "mine.png"))
    else:
        browser.driver.execute_script(DROP, list(data), "mine.png", way)
    browser.until("return location.search.includes('upload=')")
    browser.until("return document.querySelector('h1').textContent.includes('nearest')")
    assert browser.ids()[0].endswith("#rows/004")
    browser.until("return document.querySelector('.query img').naturalWidth === 256")
    browser.screenshot("given")


def test_a_click_leads_on_and_back_leads_back_and_an_address_can_be_shared(
    browser: Browser, server: Server
) -> None:
    browser.open(f"{server.address}/?view=search")
    start = browser.ids()
    browser.all(".card .picture")[3].click()
    browser.until("return location.search.includes('id=')")
    browser.until("return document.querySelector('h1').textContent.includes('nearest')")
    assert browser.query()["id"] == [start[3]]
    first = browser.ids()
    assert first[0] == start[3]
    shared = browser.driver.current_url
    browser.all(".card .picture")[2].click()
    browser.until("return !location.search.includes(arguments[0])", urlsplit(shared).query)
    browser.driver.back()
    browser.until("return document.querySelector('.query div div')?.textContent === arguments[0]", start[3])
    browser.ready()
    assert browser.ids() == first
    browser.driver.back()
    browser.until("return !document.querySelector('.query')")
    browser.ready()
    assert browser.ids() == start
    browser.driver.forward()
    browser.until("return document.querySelector('.query')")
    browser.open(shared)
    assert browser.ids() == first


def test_facets_and_a_filter_narrow_and_show_in_the_address(browser: Browser, server: Server) -> None:
    browser.open(f"{server.address}/")
    box = browser.one("aside details:nth-of-type(2) input")
    browser.driver.execute_script("arguments[0].click()", box)
    browser.until("return location.search.includes('facet=')")
    browser.ready()
    where = browser.one("#where")
    where.send_keys("json->>'$.number' < '2'\n")
    browser.until("return location.search.includes('where=')")
    browser.ready()
    narrowed = len(browser.ids())
    assert 0 < narrowed < 48
    assert f"{narrowed} images" in browser.one("h1").text
    browser.screenshot("filtered")
    browser.driver.back()
    browser.ready()
    browser.until("return document.querySelectorAll('.grid > li').length > arguments[0]", narrowed)


def test_a_filter_that_is_none_is_told_in_words(only_browser: Browser, server: Server) -> None:
    only_browser.open(f"{server.address}/?view=search&where=nonsense")
    assert "names nonsense, the columns are" in only_browser.one(".problem").text
    assert all(
        "400" in line for line in only_browser.complaints()
    )  # the browser's own line, no error of ours


def test_scripts_in_metadata_stay_text(browser: Browser, server: Server) -> None:
    browser.open(f"{server.address}/?view=search&id=a.tar%23columns/000")
    browser.driver.execute_script("window.alert = () => { window.harmed = true }")
    browser.one(".card .more").click()
    facts = browser.until("return document.querySelector('dialog[open] dl')?.textContent")
    assert "<script>alert(1)</script>" in facts
    browser.until("return document.querySelector('dialog[open] img').naturalWidth > 0")
    assert browser.driver.execute_script("return window.harmed") is None
    assert not browser.all("dialog script")
    browser.screenshot("details")
    browser.keys("\ue00c")  # Escape
    browser.until("return !document.querySelector('dialog[open]')")


def test_the_keyboard_alone_is_enough(browser: Browser, server: Server) -> None:
    browser.open(f"{server.address}/")
    names = browser.ids()
    browser.keys("\ue014", "\ue014", "\ue014")  # the first card, then two to the right
    assert names[2] in browser.driver.execute_script(
        "return document.activeElement.closest('li').textContent"
    )
    browser.keys("\ue015")  # down a row
    assert names[2] not in browser.driver.execute_script(
        "return document.activeElement.closest('li').textContent"
    )
    browser.keys("\ue013", "i")
    browser.until("return document.querySelector('dialog[open]')")
    assert names[2] in browser.one("dialog[open]").text
    browser.keys("\ue00c", "\ue007")  # Escape, Enter
    browser.until("return location.search.includes('id=')")
    browser.ready()
    assert browser.ids()[0] == names[2]
    for key, view in (("r", "review"), ("d", "duplicates"), ("o", "overview"), ("s", "search")):
        browser.keys(key)
        browser.until("return location.search === arguments[0]", f"?view={view}")
        browser.ready()
    browser.keys("/", "x")
    assert browser.one("#where").get_attribute("value") == "x"


@contextlib.contextmanager
def serving_a_copy(output: Path, folder: Path) -> Iterator[tuple[Server, Storage]]:
    """A server of an output that may be changed, `folder`/out, and that output."""
    shutil.copytree(output, folder / "out")
    with serving(folder / "out", cache=folder / "cache") as server:
        yield server, Storage(str(folder / "out"))


def test_reviews_by_keyboard_are_kept_undone_and_survive_a_killed_server(
    only_browser: Browser, output: Path, tmp_path: Path
) -> None:
    browser = only_browser
    with serving_a_copy(output, tmp_path) as (server, kept):
        label = server.get("/api/labels")["labels"][0]["label"]
        browser.open(f"{server.address}/?view=review&label={label}")
        browser.complaints()
        names = browser.ids()
        decided: Callable[[int], Any] = lambda count: browser.until(  # noqa: E731
            "return document.querySelectorAll('.card[data-action]').length === arguments[0]", count
        )
        browser.keys("a", "x")  # faster than the server answers
        decided(2)
        browser.keys("c")
        browser.until("return document.querySelector('dialog[open] #new-label')")
        browser.keys("zebra", "\ue007")
        decided(3)
        browser.screenshot("review")
        browser.keys("u")
        decided(2)
        browser.keys("\ue00d", "\ue014", "\ue00d", "a")  # space, right, space: two at once
        decided(4)
        held = standing(kept)
        assert {it: held[it].action for it in held} == {
            names[0]: "accept",
            names[1]: "reject",
            names[2]: "accept",
            names[3]: "accept",
        }
        assert browser.complaints() == []
        assert browser.faults() == []
        server.kill()
        browser.keys("x")
        browser.until("return document.querySelector('#notice').textContent.includes('cannot be reached')")
        assert len(browser.all(".card[data-action]")) == 4
    said = [(it.action, it.image_id) for it in read_decisions(kept)]
    assert said == [
        ("accept", names[0]),
        ("reject", names[1]),
        ("relabel", names[2]),
        ("undo", names[2]),
        ("accept", names[2]),
        ("accept", names[3]),
    ]
    with serving(tmp_path / "out", cache=tmp_path / "cache") as server:
        browser.open(f"{server.address}/?view=review&label={label}&show=decided")
        assert sorted(browser.ids()) == sorted(names[:4])


CLICK = """
[...document.querySelectorAll(arguments[0])].find((it) => it.textContent.startsWith(arguments[1])).click()
"""
SLOW_ANSWERS = """
const quick = window.fetch;
window.fetch = async (path, options) => {
  if (options?.method === "POST") await new Promise((done) => setTimeout(done, 700));
  return quick(path, options);
};
"""


def test_a_key_means_what_was_seen_when_it_was_pressed(
    only_browser: Browser, output: Path, tmp_path: Path
) -> None:
    browser = only_browser
    with serving_a_copy(output, tmp_path) as (server, kept):
        one, other = (it["label"] for it in server.get("/api/labels")["labels"][:2])

        browser.open(f"{server.address}/?view=review&label={one}")
        browser.driver.execute_script(SLOW_ANSWERS)
        names = browser.ids()
        browser.keys("a", "a")
        browser.driver.execute_script(CLICK, ".choices a", other)
        browser.until("return document.querySelector('h1').textContent.startsWith(arguments[0])", other)
        others = browser.ids()
        wait_for_decisions(kept, 2)
        assert standing(kept).keys() == set(names[:2])

        browser.keys("x")
        browser.driver.execute_script(CLICK, "button", "Accept all shown")
        wait_for_decisions(kept, 2 + len(others))
        held = standing(kept)
        assert [held[name].action for name in others] == ["reject"] + ["accept"] * (len(others) - 1)

        browser.open(f"{server.address}/?view=review&label=none")
        assert "no image has the label none" in browser.one(".problem").text
        browser.keys("a")
        browser.until("return document.querySelector('#notice').textContent.includes('Choose an image')")
        assert standing(kept) == held


def wait_for_decisions(output: Storage, count: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while len(list(read_decisions(output))) < count and time.monotonic() < until:
        time.sleep(0.1)
    assert len(list(read_decisions(output))) == count


@pytest.mark.parametrize("view", ["search", "review", "duplicates", "overview"])
@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (390, "dark")])
def test_no_serious_fault_of_access_in_any_view(
    browser: Browser, server: Server, view: str, width: int, scheme: str
) -> None:
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.open(f"{server.address}/?view={view}")
        browser.screenshot(f"{view}-{width}-{scheme}")
        assert browser.faults() == []
        over = browser.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert over <= 0
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_overview_leads_to_the_reports(browser: Browser, server: Server) -> None:
    browser.open(f"{server.address}/?view=overview")
    report = browser.one("td a").get_attribute("href")
    assert browser.one(".tiles").text.count(str(NUM_IMAGES)) >= 2
    browser.driver.get(report)
    assert "images" in browser.one("body").text
