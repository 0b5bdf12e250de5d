"""The page in a real browser, against the real server: what it shows is what the service answers, pixel for pixel."""

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline.storage import atomic
from serving.http import app
from tests.support import live_server, tiny_onnx
from tests.support.image_files import exif, save
from tests.support.live_server import Server
from tests.support.serving.browser import Browser, png, start

PALETTE = np.array([[*item["color"], 255] for item in tiny_onnx.CLASSES], np.uint8)
NAMES = [item["name"] for item in tiny_onnx.CLASSES]
ENTER, SPACE, TAB, HOME, END = "\ue007", " ", "\ue004", "\ue011", "\ue010"
LEFT, RIGHT, DOWN = "\ue012", "\ue014", "\ue015"


def blobs(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(8).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with start() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, server: Server) -> Browser:
    chromium.size(1280)
    chromium.open(server.url)
    return chromium


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "it's a photo.png"
    file.write_bytes(save(Image.fromarray(blobs(120, 200))))
    return file


def answer(http: httpx.Client, file: Path, view: str = "mask") -> httpx.Response:
    sent = {"content": file.read_bytes(), "headers": {"Content-Type": "image/png"}}
    return http.post(f"/v1/segment?view={view}", **sent).raise_for_status()


def label(http: httpx.Client, file: Path) -> np.ndarray:
    return png(answer(http, file).content)


def offered(http: httpx.Client) -> set[str]:
    parameters = http.get("/v1/openapi.json").json()["paths"]["/v1/segment"]["post"]["parameters"]
    view = next(one["schema"] for one in parameters if one["name"] == "view")
    return {value for schema in (view, *view.get("anyOf", [])) for value in schema.get("enum", [])}


def test_everything_the_page_is_made_of_is_served_under_a_strict_policy(http: httpx.Client) -> None:
    found = {path.name for path in app.WEB.iterdir()}
    assert found >= {"index.html", "app.js", "style.css"}
    for name in found:
        response = http.get(f"/web/{name}")
        assert response.content == (app.WEB / name).read_bytes()
        assert "unsafe" not in response.headers["content-security-policy"]
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", response.text)
    assert http.get("/web/").status_code == http.get("/web/../app.py").status_code == 404


def test_the_mask_lies_over_the_image(page: Browser, http: httpx.Client, photo: Path) -> None:
    page.choose(photo)
    np.testing.assert_array_equal(page.pixels("cover"), PALETTE[label(http, photo)])
    np.testing.assert_array_equal(page.pixels("picture")[..., :3], png(photo.read_bytes()))
    facts = answer(http, photo, "json").json()
    rows = {row.find_element("tag name", "th").text: row.text for row in page.all("#legend tr")}
    assert list(rows) == [one["name"] for one in sorted(facts["classes"], key=lambda c: -c["pixels"])]
    for one in facts["classes"]:
        sure = "–" if one["confidence"] is None else f"{round(100 * one['confidence'])} %"
        assert rows[one["name"]].split(None, 1)[1] == f"{100 * one['share']:.1f} % {sure}"
    assert "200 × 120 pixels" in page.text("about")
    assert facts["bundle"] in page.text("about")
    assert page.requests()
    assert page.complaints() == []


def test_a_large_image_is_scaled_for_display_only(page: Browser, http: httpx.Client, tmp_path: Path) -> None:
    for height, width in ((61, 4100), (2500, 50)):
        file = tmp_path / f"{height}.png"
        file.write_bytes(save(Image.fromarray(blobs(height, width))))
        page.choose(file)
        cover, full = page.pixels("cover"), label(http, file)
        assert max(cover.shape) == 2048
        rows, columns = (
            ((2 * np.arange(n) + 1) * whole) // (2 * n) for n, whole in zip(cover.shape[:2], full.shape, strict=True)
        )
        np.testing.assert_array_equal(cover, PALETTE[full[rows][:, columns]])
        assert f"{width} × {height} pixels" in page.text("about")


def test_a_turned_photograph_stands_upright_below_its_mask(page: Browser, http: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "turned.jpg"
    picture = blobs(60, 90)
    file.write_bytes(save(Image.fromarray(picture), "JPEG", quality=95, exif=exif(6)))
    page.choose(file)
    assert page.pixels("cover").shape == (90, 60, 4)
    error = np.abs(page.pixels("picture")[..., :3].astype(int) - np.rot90(picture, -1))
    assert error.mean() < 4


def test_a_format_that_the_browser_cannot_draw_shows_its_classes(page: Browser, tmp_path: Path) -> None:
    file = tmp_path / "picture.tiff"
    file.write_bytes(save(Image.fromarray(blobs(50, 60)), "TIFF"))
    page.choose(file)
    assert page.pixels("cover").any()
    assert not page.pixels("picture").any()
    assert "only the classes are shown" in page.text("about")


def test_toggles_change_their_own_pixels(page: Browser, http: httpx.Client, photo: Path) -> None:
    page.choose(photo)
    before, ids = page.pixels("cover"), label(http, photo)
    for value in np.unique(ids):
        box = page.all(f"#legend input[value='{value}']")[0]
        box.click()
        now = page.pixels("cover")
        np.testing.assert_array_equal((now != before).any(axis=2), ids == value)
        assert not now[ids == value].any()
        box.click()
    np.testing.assert_array_equal(page.pixels("cover"), before)
    page.get("none").click()
    assert not page.pixels("cover").any()
    page.get("all").click()
    np.testing.assert_array_equal(page.pixels("cover"), before)


def test_opacity(page: Browser, photo: Path) -> None:
    page.choose(photo)
    for key, said, css in ((HOME, "0 %", "0"), (END, "100 %", "1"), (LEFT, "99 %", "0.99")):
        page.get("opacity").send_keys(key)
        assert page.text("percent") == said
        assert page.get("cover").value_of_css_property("opacity") == css


def test_pointing_reads_the_class(page: Browser, http: httpx.Client, photo: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.choose(photo)
    ids, stage = label(http, photo), page.get("stage")
    page.js("arguments[0].scrollIntoView({block: 'center'})", stage)
    for x, y in ((20, 20), (150, 30), (60, 100), (180, 90)):
        across, down = ((x + 0.5) / 200 - 0.5) * stage.rect["width"], ((y + 0.5) / 120 - 0.5) * stage.rect["height"]
        ActionChains(page.driver, duration=0).move_to_element_with_offset(stage, round(across), round(down)).perform()
        words = page.text("tip").split(" · ")
        at = [int(part) for part in words[-1].split(", ")]
        assert max(abs(at[0] - x), abs(at[1] - y)) <= 1
        assert words[0] == NAMES[ids[at[1], at[0]]]
    assert page.text("spoken") == ""


def test_confidence(page: Browser, http: httpx.Client, photo: Path) -> None:
    if "confidence" not in offered(http):
        pytest.skip("this service has no confidence answer yet")
    page.choose(photo)
    page.all("[name=layer][value=confidence] + span")[0].click()
    page.wait(lambda: page.get("scale").is_displayed())
    confidence, heat = png(answer(http, photo, "confidence").content), page.pixels("cover")
    order = np.argsort(confidence, axis=None)
    lightness = heat.reshape(-1, 4)[order, :3].sum(axis=1).astype(int)
    assert (np.diff(lightness) <= 0).all()
    assert len(np.unique(heat.reshape(-1, 4), axis=0)) > 50
    page.get("stage").send_keys(LEFT)
    name, sure, x, y = page.text("spoken").split(", ")
    assert sure == f"{round(100 * int(confidence[int(y), int(x)]) / 255)} % sure"
    assert name in NAMES
    box = page.all("#legend input")[0]
    box.click()
    np.testing.assert_array_equal(
        page.pixels("cover")[..., 3] == 0, label(http, photo) == int(box.get_attribute("value"))
    )


def test_pointing_gives_up_where_the_confidence_cannot_be_had(page: Browser, photo: Path) -> None:
    page.choose(photo)
    page.js(
        "const real = fetch; window.asked = 0; window.fetch = (path, options) => path.includes('view=confidence')"
        " ? (window.asked++, Promise.reject(new Error('no'))) : real(path, options)"
    )
    for _ in range(3):
        page.get("stage").send_keys(LEFT)
    assert page.js("return asked") == 1
    assert not page.get("problem").is_displayed()
    page.all("[name=layer][value=confidence] + span")[0].click()  # who asks for it is told
    page.wait(lambda: page.get("problem").is_displayed())
    assert page.js("return asked") == 2


def test_what_is_shown_smaller_is_downloaded_whole(page: Browser, http: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    file.write_bytes(save(Image.fromarray(blobs(61, 4100))))
    page.choose(file)
    page.get("stage").send_keys(LEFT)
    page.wait(lambda: "sure" in page.text("spoken"))  # a smaller one was fetched for that
    page.all("[name=kind][value=confidence] + span")[0].click()
    page.get("download").click()
    downloaded = page.downloads / "wide.confidence.png"
    page.wait(downloaded.exists)
    assert downloaded.read_bytes() == answer(http, file, "confidence").content


def test_only_what_the_service_offers_is_offered(page: Browser, http: httpx.Client, photo: Path) -> None:
    page.choose(photo)
    assert {box.get_attribute("value") for box in page.all("[name=kind]")} == offered(http)
    assert page.get("views").is_displayed() == ("confidence" in offered(http))


def test_what_every_version_offers_is_offered_without_a_description(page: Browser, server: Server) -> None:
    page.cdp("Network.enable")
    page.cdp("Network.setBlockedURLs", urls=["*/v1/openapi.json"])
    try:
        page.open(server.url)
        assert [box.get_attribute("value") for box in page.all("[name=kind]")] == ["mask", "overlay", "json"]
    finally:
        page.cdp("Network.setBlockedURLs", urls=[])


def test_downloads_are_the_services_bytes(page: Browser, http: httpx.Client, photo: Path) -> None:
    page.choose(photo)
    for view, ending in (("mask", "mask.png"), ("overlay", "overlay.png"), ("json", "json"), ("geojson", "geojson")):
        if view not in offered(http):
            continue
        page.all(f"[name=kind][value={view}] + span")[0].click()
        page.get("download").click()
        file = page.downloads / f"it's a photo.{ending}"
        page.wait(file.exists)
        assert file.read_bytes() == answer(http, photo, view).content


@pytest.mark.skipif(shutil.which("curl") is None, reason="it is curl's command")
def test_the_command_does_it(page: Browser, http: httpx.Client, photo: Path, tmp_path: Path) -> None:
    page.choose(photo)
    shutil.copy(photo, tmp_path)
    command = page.text("curl").replace("curl ", "curl -s --noproxy '*' ", 1)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    assert (tmp_path / "it's a photo.mask.png").read_bytes() == answer(http, photo).content
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.get("copy").click()
    page.wait(lambda: page.text("status") == "The command is copied.")


def test_an_error_is_told_with_its_code_and_request(page: Browser, server: Server, photo: Path, tmp_path: Path) -> None:
    page.choose(photo)
    file = tmp_path / "words.txt"
    file.write_text("not an image")
    page.choose(file)
    said = page.get("problem").text
    assert said.startswith("words.txt: these bytes are no image")
    assert "not-an-image · status 400 · request " in said
    request = said.split("request ")[1].split()[0]
    live_server.until(lambda: any(e["request_id"] == request for e in server.events("request")))
    assert page.get("problem").get_attribute("role") == "alert"
    assert not page.get("result").is_displayed()
    page.choose(photo)
    assert not page.get("problem").is_displayed()


def test_a_token_is_asked_for_and_kept_in_memory_only(page: Browser, photo: Path) -> None:
    url = live_server.guarded().url
    page.open(url)
    assert "unauthorized · status 401" in page.get("problem").text
    assert page.focus() == "token"
    before = page.text("problem")
    page.keys("wrong", ENTER)
    page.wait(lambda: page.text("problem") != before and page.focus() == "token")
    page.get("token").clear()
    page.get("token").send_keys(live_server.TOKEN, ENTER)
    page.wait(lambda: page.get("card").is_displayed() and not page.get("secret").is_displayed())
    page.choose(photo)
    assert page.get("result").is_displayed()
    assert '-H "Authorization: Bearer $MARGINALIA_TOKEN"' in page.text("curl")
    kept = page.js(
        "return [document.documentElement.outerHTML, document.cookie, JSON.stringify(localStorage),"
        " JSON.stringify(sessionStorage), location.href].join()"
    )
    assert live_server.TOKEN not in kept
    page.open(url)
    assert page.get("secret").is_displayed()


def test_paste_and_drop(page: Browser, http: httpx.Client, photo: Path) -> None:
    send = """
      const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0)), data = new DataTransfer();
      data.items.add(new File([bytes], 'image.png', {type: 'image/png'}));
      const event = arguments[0] === 'paste' ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true})
        : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
      document.getElementById('result').hidden = true;
      document.body.dispatchEvent(event);
    """
    for kind in ("paste", "drop"):
        page.js(send, kind, base64.b64encode(photo.read_bytes()).decode())
        page.wait(lambda: page.get("result").is_displayed() and page.settled())
        np.testing.assert_array_equal(page.pixels("cover"), PALETTE[label(http, photo)])


def test_with_the_keyboard_alone(page: Browser, http: httpx.Client, photo: Path) -> None:
    page.js("file.addEventListener('click', e => { window.asked = (window.asked ?? 0) + 1; e.preventDefault(); })")
    page.keys(TAB)
    assert page.focus() == "drop"
    page.keys(ENTER)
    page.keys(SPACE)
    assert page.js("return window.asked") == 2
    page.choose(photo)
    ids, order = label(http, photo), ["drop"]
    for _ in range(30):
        page.keys(TAB)
        if page.js("return document.activeElement === document.body"):
            break
        order.append(page.focus())
        style = "const s = getComputedStyle(document.activeElement.matches('.choice input') ?"
        style += " document.activeElement.nextSibling : document.activeElement); return s.outlineStyle + s.outlineWidth"
        assert page.js(style) == "solid3px", order
        if order[-1] == "stage":
            page.keys(DOWN, LEFT)
            name, x, y = page.text("spoken").rsplit(", ", 2)
            assert (int(x), int(y)) == (100 - 5, 60 + 5)
            assert name.split(",")[0] == NAMES[ids[int(y), int(x)]]
        if order[-1] == "1":
            page.keys(SPACE)
            np.testing.assert_array_equal(page.pixels("cover")[..., 3] == 0, ids == 1)
    seen = sorted(np.unique(ids), key=lambda i: (-(ids == i).sum(), i))
    layers = ["classes"] if "confidence" in offered(http) else []
    want = ["drop", "stage", *layers, "opacity", "all", "none", *map(str, seen), "mask", "download", "curl", "copy"]
    assert order[: len(want)] == want


@pytest.mark.parametrize("dark", [False, True])
def test_names_and_contrast(page: Browser, photo: Path, dark: bool) -> None:
    """WCAG 2.2: 4.1.2 (every control has a name), 1.4.3 (text stands out from its ground by 4.5)."""
    page.size(1280, dark=dark)
    page.choose(photo)
    page.js("for (const part of [secret, views, scale, problem]) part.hidden = false; problem.textContent = 'words'")
    controls = page.all("button, input:not([hidden]), [tabindex], a")
    assert len(controls) > 15
    for control in controls:
        assert control.accessible_name, control.get_attribute("outerHTML")
    names = [table.accessible_name for table in page.all("table")]
    assert names == ["Classes", "Intersection over union of each class"]
    poor = page.js(CONTRAST)
    assert poor["checked"] > 40
    assert poor["found"] == []


CONTRAST = """
const rgba = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = node => {
  for (; node; node = node.parentElement) {
    const color = rgba(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const found = [];
let checked = 0;
for (const node of document.body.querySelectorAll('*')) {
  const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  if (!own || !node.checkVisibility() || node.closest('.unseen, #tip, noscript')) continue;
  const [high, low] = [light(rgba(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
  checked++;
  if ((high + .05) / (low + .05) < 4.5) found.push(node.outerHTML.slice(0, 100) + (high + .05) / (low + .05));
}
return {checked, found};
"""


def test_a_phones_width(page: Browser, photo: Path, tmp_path: Path) -> None:
    page.size(360, 740)
    fits = "const d = document.documentElement; return innerWidth === 360 && d.scrollWidth <= d.clientWidth"
    assert page.js(fits)
    page.choose(photo)
    assert page.js(fits)
    assert page.js(
        "return [...document.querySelectorAll('button')].every(b => !b.checkVisibility() || b.offsetHeight >= 24)"
    )
    file = tmp_path / f"{'long-name-without-a-break' * 6}.txt"
    file.write_text("words")
    page.choose(file)
    assert page.js(fits)


def test_the_model_card(page: Browser, server: Server) -> None:
    manifest = atomic.read_json(server.folder / "champions/first/bundle/bundle.json")
    said = page.get("card").text
    assert "61.5 %" in said
    for value in (manifest["id"], manifest["method"], manifest["data_hash"][:12], manifest["commit"][:12], "cpu, fp32"):
        assert value in said
    assert [row.text.split()[0] for row in page.all("#facts tbody tr")] == NAMES
    assert manifest["id"] in page.text("serving")


def test_the_model_cards_intervals(page: Browser) -> None:
    """As the gate writes them; a class that was in no test image has null. Names are text, never markup."""
    model = page.js("return fetch('v1/model').then(response => response.json())")
    model["classes"][0]["name"] = "<b>dark</b>"
    model["metrics"] = {
        "miou": 61.55, "miou_ci": [58.0, 64.96], "per_class": {"<b>dark</b>": 93.21, "red": None, "green": 30.0},
        "per_class_ci": {"<b>dark</b>": [90.0, 95.0], "red": None, "green": [20.5, 41.0]},
    }  # fmt: skip
    page.js("return import('./web/card.js').then(card => card.showCard(arguments[0]))", model)
    rows = [row.text for row in page.all("#facts tbody tr")]
    assert rows == ["<b>dark</b> 93.2 90.0 to 95.0", "red – –", "green 30.0 20.5 to 41.0", "blue – –"]
    assert "61.5 %\n95 % interval 58.0 to 65.0" in page.get("facts").text
    bar = page.all("#facts .bar")[2]
    fill, whisker = (bar.find_element("tag name", tag).rect for tag in ("i", "b"))
    assert fill["width"] / bar.rect["width"] == pytest.approx(0.3, abs=0.01)
    assert (whisker["x"] - bar.rect["x"]) / bar.rect["width"] == pytest.approx(0.205, abs=0.01)
    assert whisker["width"] / bar.rect["width"] == pytest.approx(0.205, abs=0.01)


def test_nothing_goes_elsewhere_and_nothing_fails(page: Browser, server: Server, photo: Path) -> None:
    page.choose(photo)
    page.get("download").click()
    page.wait(lambda: "downloaded" in page.text("status"))
    asked = page.requests()
    assert {url for url in asked if not url.startswith((server.url + "/", "blob:" + server.url + "/"))} == set()
    assert sum("/v1/segment" in url for url in asked) >= 2
    assert page.complaints() == []
