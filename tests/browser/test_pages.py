"""The pages in real Chromium: nothing is loaded, nothing fails, everything can be reached by mouse and by keys, and read."""

from __future__ import annotations

import json
import time

import pytest
import torch

from indistill_fx.passes.align import align_traced
from indistill_fx.passes.capture.trace import trace
from indistill_fx.report import alignment_page, run_page, see
from tests.report_samples import NASTY, leave_run, network

CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255); };
const light = (c) => c.slice(0, 3).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const behind = (element) => { const layers = []; for (let e = element; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3]) layers.push(c); if (c[3] === 1) break; }
  return layers.reverse().reduce((below, c) => below.map((v, k) => k < 3 ? c[k] * c[3] + v * (1 - c[3]) : 1), [1, 1, 1, 1]); };
const bad = []; let count = 0;
for (const e of document.querySelectorAll("body *")) {
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
  if (e.closest("title, script, option, .skip")) continue;
  const style = getComputedStyle(e), ink = rgba(e.closest("svg") ? style.fill : style.color), paper = behind(e);
  const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  count++; if (ratio < 4.5) bad.push([e.tagName, e.className.baseVal ?? e.className, e.textContent.slice(0, 30), ratio]);
}
return {count, bad};
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("pages")
    x = torch.randn(2, 3, 16, 16)
    models = trace(network(8, 7), x, role="teacher"), trace(network(4, 2), x, role="student")
    found = align_traced(*models)
    (home / "alignment.html").write_text(
        alignment_page(found.value, see(found.value, *models, found.report)), encoding="utf-8"
    )
    for name in ("labels", "kd", "layer1"):
        leave_run(home / "runs" / name, name=name)
    (home / "run.html").write_text(run_page(home / "runs"), encoding="utf-8")
    for k, name in enumerate(NASTY):
        leave_run(home / "nasty" / str(k), name=name, error=name, about={name: name})
        (home / f"nasty{k}.html").write_text(run_page(home / "nasty" / str(k)), encoding="utf-8")
    return home


@pytest.fixture
def visit(chromium, folder):
    def go(name: str, *, width: int = 1440, theme: str = "light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        chromium.get_log("browser"), chromium.get_log("performance")
        chromium.get((folder / name).as_uri())
        return chromium

    return go


def first(page, selector: str):
    return page.find_element("css selector", selector)


def requests(page, own: str) -> list[str]:
    """What a page asked for; Chromium's start page may be asking for things of its own at the same time."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in sent if request["documentURL"] == own]


def press(page, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(*keys).perform()


@pytest.mark.parametrize("name", ["alignment.html", "run.html"])
def test_a_page_loads_without_errors_or_requests_and_fits_a_phone(visit, folder, name):
    page = visit(name, width=390)
    assert page.get_log("browser") == []
    own = (folder / name).as_uri()
    assert requests(page, own) == [own]
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390


def test_the_check_for_requests_sees_one(visit, folder):
    (folder / "asks.html").write_text("<img src='nothing.png'>")
    page = visit("asks.html")
    assert [entry["level"] for entry in page.get_log("browser")] == ["SEVERE"]
    own = (folder / "asks.html").as_uri()
    assert requests(page, own) == [own, (folder / "nothing.png").as_uri()]


def test_arcs_are_the_pairs_and_end_at_their_layers(visit):
    page = visit("alignment.html")
    ends = page.execute_script(
        """return [...document.querySelectorAll(".arc")].map((arc) => {
          const box = arc.querySelector(".line").getBoundingClientRect();
          const rows = [...document.querySelectorAll(`.row[data-pair="${arc.dataset.pair}"] > .layer`)].map((row) => {
            const own = row.getBoundingClientRect(); return own.top + own.height / 2; });
          return [arc.dataset.pair, Math.min(...rows) - box.top, Math.max(...rows) - box.bottom]; })"""
    )
    assert [key for key, _, _ in ends] == ["1", "2", "embedding"]
    assert all(abs(top) < 4 and abs(bottom) < 4 for _, top, bottom in ends)


def test_pointing_at_a_layer_or_an_arc_tells_about_it(visit):
    from selenium.webdriver import ActionChains

    page = visit("alignment.html")
    details = first(page, "#details")
    ActionChains(page).move_to_element(first(page, ".teacher .row.paired .layer")).perform()
    for text in ("layer1", "8×8×8", "MACs", "4 of 8 channels", "Runner-up", "less alike"):
        assert text in details.text
    ActionChains(page).move_to_element(first(page, ".student .exit[data-pair='2'] .layer")).perform()
    assert "8×4×4" in details.text
    arc = first(page, ".arc[data-pair='1']")
    page.execute_script("arguments[0].focus()", arc)
    assert "Score" in details.text and "layer1 ↔ with layer1".split()[0] in details.text


def test_the_keys_reach_everything(visit):
    from selenium.webdriver import Keys

    page = visit("alignment.html")
    active = "return document.activeElement.closest('.row')?.id + ' ' + document.activeElement.textContent"
    press(page, "/")
    assert page.switch_to.active_element.get_attribute("id") == "find"
    press(page, Keys.TAB)
    first_row = page.execute_script(active)
    press(page, Keys.ARROW_DOWN)
    assert page.execute_script(active) != first_row
    press(page, Keys.END)
    assert "fc" in page.execute_script(active)
    assert "Operation" in first(page, "#details").text
    press(page, Keys.ARROW_RIGHT)
    assert page.execute_script(active).startswith("s")
    press(page, Keys.ENTER)
    assert page.switch_to.active_element.get_attribute("aria-expanded") == "true"
    press(page, Keys.ESCAPE)
    assert "Point at a layer" in first(page, "#details").text


def test_search_finds_an_operation_in_a_folded_block_and_unfolds_it(visit):
    from selenium.webdriver import Keys

    page = visit("alignment.html")
    assert not page.find_elements("css selector", ".operations")
    press(page, "/", "convs.3", Keys.ENTER)
    hit = first(page, ".found")
    assert hit.is_displayed() and "layer1.convs.3" in hit.text and "conv" in hit.text
    find = first(page, "#find")
    find.clear()
    find.send_keys("nowhere")
    assert "No layer" in first(page, "#hits").text


def test_unfolding_everything_shows_the_whole_graph(visit):
    page = visit("alignment.html")
    page.execute_script("for (const b of document.querySelectorAll('.fold')) b.click()")
    page.execute_script("for (const b of document.querySelectorAll('.layer:not(.fold)')) b.click()")
    shown, known = page.execute_script(
        """const data = JSON.parse(document.getElementById("data").textContent).operations;
        return [document.querySelectorAll(".operations li").length, data.teacher.length + data.student.length]"""
    )
    assert shown == known > 60


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["alignment.html", "run.html"])
def test_all_text_can_be_read_in_both_themes(visit, name, theme):
    page = visit(name, theme=theme)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    found = page.execute_script(CONTRAST)
    assert found["bad"] == [] and found["count"] > 60
    backgrounds = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    first(page, "#theme").click()
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") != backgrounds
    assert page.execute_script(CONTRAST)["bad"] == []


def test_the_contrast_check_sees_pale_text(visit):
    page = visit("run.html")
    page.execute_script("document.querySelector('h1').style.color = '#ccc'")
    assert [entry[0] for entry in page.execute_script(CONTRAST)["bad"]] == ["H1"]


def test_on_paper_all_numbers_are_open_and_afterwards_as_before(visit):
    page = visit("run.html")
    count = "return [...document.querySelectorAll('details')].filter((d) => d.open === %s).length"
    before = page.execute_script(count % "true")
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    shut = page.execute_script("return [...document.querySelectorAll('details:not([open])')].map((d) => d.textContent)")
    assert len(shut) == 4 and all("command" in text or "plan.json" in text for text in shut)
    assert first(page, "table td.n").is_displayed()
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert page.execute_script(count % "true") == before


@pytest.mark.parametrize("k", range(len(NASTY)))
def test_no_name_becomes_a_script(visit, k):
    page = visit(f"nasty{k}.html")
    page.execute_script("for (const b of document.querySelectorAll('.layer, .arc')) b.focus()")
    press(page, "/", "n")
    assert page.execute_script("return window.hit === undefined && !document.querySelector('img')")
    assert page.get_log("browser") == []


@pytest.mark.slow
def test_resnet152_is_quick_to_write_and_small(chromium, tmp_path):
    from torchvision.models import resnet50, resnet152

    x = torch.randn(2, 3, 32, 32)
    models = trace(resnet152(), x, role="teacher"), trace(resnet50(), x, role="student")
    found = align_traced(*models)
    before = time.perf_counter()
    text = alignment_page(found.value, see(found.value, *models, found.report))
    assert time.perf_counter() - before < 5
    assert len(text.encode()) < 3_000_000
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    chromium.get((tmp_path / "page.html").as_uri())
    count = chromium.execute_script(
        "let n = 0; const walk = document.createTreeWalker(document); while (walk.nextNode()) n++; return n"
    )
    assert count < 20_000
