"""The data report of a project whose every name is hostile: what it shows, that nothing breaks out, how large it gets."""

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
from PIL import Image

from pipeline.ingest import dump_registry
from pipeline.reports import data_report, page, sections, thumbnails
from pipeline.storage import atomic, manifest, shards
from tests.support import tiny_project, tiny_settings
from tests.support.command_line import marginalia

HOSTILE = '"><img src=x onerror=alert(1)>'
EVIL = f"{HOSTILE}<script>alert(2)</script>&amp;\x00\u202e'"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "nav", "ul", "li", "a", "main", "section",
    "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "figure", "figcaption", "img", "strong",
}  # fmt: skip


class Reader(HTMLParser):
    """Tags with attributes, texts, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section, self.said = "", dict[str, str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said[self.section] = self.said.get(self.section, "") + data.strip("\n")


def jpeg(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A split, a later dump, one pair of look-alikes, two refused files (one decodes), a ranking and a suspect."""
    monkeypatch.chdir(tmp_path)
    parts = [("labelled", "base", "a", 3), ("unlabelled", "base", "b", 3), ("test", "base", "d", 2)]
    rows = tiny_project.write_data(tmp_path, [*parts, ("unlabelled", "night", "n", 2)])
    rows = [replace(row, group=f"{row.group}{HOSTILE}", name=f"{row.name}{EVIL}") for row in rows]
    for dump in ("base", "night"):
        manifest.write(Path("data/ingested") / dump / "rows.parquet", [row for row in rows if row.dump == dump])
    manifest.write(Path("data/split/manifest.parquet"), rows[1:])
    summary = atomic.read_json(Path("data/split/summary.json"))
    summary["classes"][0]["name"] = HOSTILE
    summary["pixels"] = {"labelled": {HOSTILE: 25, "wall": 75, "floor": 0, "lamp": 0}, "test": {HOSTILE: 1, "wall": 1}}
    summary |= {"missing": {"labelled": ["floor", "lamp"]}, "groups": {"labelled": ["a"], "val": [], "test": ["d"]}}
    atomic.write_json(Path("data/split/summary.json"), summary)
    image, mask = tiny_project.scene(np.random.default_rng(0), 64, 96)
    delivered = [("images/small.png", tiny_project.png(image)), (f"images/{EVIL}.png", b"no image")]
    shards.write_tar(Path("data/pulled/base.tar"), delivered)
    base = dump_registry.DumpEntry(archive="data/pulled/base.tar")
    night = dump_registry.DumpEntry(archive="data/dumps/night.tar", added="2026-01-02T03:04:05Z", images=2)
    dump_registry.write_dumps(dump_registry.DumpRegistry(dumps={"base": base, "night": night}), Path("dumps.yaml"))
    refused = [
        {"dump": "base", "name": "small", "code": "rgb-mask", "reason": f"mask {EVIL}", "kept": True},
        {"dump": "base", "name": EVIL, "code": "corrupt", "reason": "no image", "kept": False},
    ]
    look = {"dump": "base", "name": rows[0].name, "code": "near-duplicate", "kept": False}
    look["reason"] = (
        f"looks like base/{rows[1].name} and 2 more (difference hash within 3 bits; ingest.near_duplicate_bits)"
    )
    atomic.write_json(Path("data/quarantine.json"), [*refused, look])
    found = {"energy": 1.25, "p": 0.004, "rule": "groups", "drifted": True, "images": 2}
    atomic.write_json(Path("reports/screen.json"), {"space": "image descriptor", "dumps": {"night": found}})
    head = "place,id,name,dump,group,doubt,distance,margin,most_doubted\n"
    quoted = HOSTILE.replace('"', '""')
    atomic.write_text(Path("reports/rank.csv"), f'{head}1,x,shot/one,night,n,0.5,1.0,0.2,"{quoted}"\n')
    atomic.write_bytes(Path("reports/label_next/images/shot/one.jpg"), jpeg(image))
    atomic.write_bytes(Path("reports/label_next/masks/shot/one.png"), tiny_project.label_maps.encode_png(mask))
    head = "split,place,score,name,dump,group,id,given,suggested,region_pixels,left,top,right,bottom,regions,picture\n"
    line = "val,1,0.25,odd,base,g,x,wall,floor,9,0,0,3,3,1,reports/suspects/val-001.jpg\n"
    atomic.write_text(Path("reports/suspect_labels.csv"), head + line)
    atomic.write_bytes(Path("reports/suspects/val-001.jpg"), jpeg(np.hstack([image] * 4)))
    tiny_settings.write(Path("params.yaml"))
    return tmp_path


def test_every_section_says_what_it_should(project: Path) -> None:
    read = Reader(data_report.build())
    said = read.said
    assert "25.00 %" in said["classes"]
    assert HOSTILE in said["classes"]
    assert "class floor, lamp: no pixel in labelled" in said["warnings"]
    assert "no val image at all" in said["warnings"]
    assert "2026-01-02T03:04:05Z" in said["dumps"]
    for part in ("night", "DRIFTED", "1.2500", "0.0040", "drift.json: not there yet"):
        assert part in said["drift"]
    assert "only its mask; the image stays" in said["quarantine"]
    assert "looks like" in said["duplicates"]
    assert "doubt 0.500" in said["label-next"]
    assert "the mask says wall, the student floor (score 0.250)" in said["suspects"]
    sources = [attributes["src"] for name, attributes in read.tags if name == "img"]
    assert len(sources) == 5  # a refused image that decodes, a pair, a pre-label, a suspect
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(str(source).removeprefix("data:image/jpeg;base64,")))) as picture:
            assert 1 < picture.width <= thumbnails.STRIP
    anchors = {str(attributes["href"])[1:] for name, attributes in read.tags if name == "a"}
    assert anchors == {str(attributes["id"]) for name, attributes in read.tags if name == "section"}


def test_hostile_names_stay_text_and_nothing_is_fetched(project: Path) -> None:
    text = data_report.build()
    read = Reader(text)
    assert read.open == []
    assert {name for name, _ in read.tags} <= TAGS
    for name, attributes in read.tags:
        assert not any(key.startswith("on") for key in attributes), name
        assert not attributes.get("src") or str(attributes["src"]).startswith("data:image/jpeg;base64,")
        assert name != "a" or str(attributes["href"]).startswith("#")
        assert name != "img" or attributes.get("alt")
    assert "script" not in {name for name, _ in read.tags}
    assert "http://" not in text
    assert "https://" not in text
    assert "\x00" not in text
    assert "\u202e" not in text  # turns the reading direction round
    assert "<script>alert(2)</script>&amp;" in "".join(read.said.values())  # as words, not lost
    heads = [attributes for name, attributes in read.tags if name == "th"]
    assert heads
    assert all(attributes.get("scope") in ("row", "col") for attributes in heads)


def test_escaping_covers_text_and_attributes() -> None:
    template = page.environment().from_string('<p class="{{ kind }}">{{ text }}<a href="{{ link }}"></a></p>')
    made = template.render(kind="a'b", text="<b>\x07x & y", link='"><x')
    assert made == '<p class="a&#39;b">&lt;b&gt; x &amp; y<a href="&#34;&gt;&lt;x"></a></p>'


def test_a_bar_has_the_length_of_its_share_and_at_most_all() -> None:
    percent = page.environment().get_template("macros.html.jinja").module.percent
    assert percent(0.5).count("--share:50.00%") == 1
    assert "700.00 %" in percent(7.0)
    assert "--share:100.00%" in percent(7.0)


def test_a_name_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        page.environment().from_string("{{ missing }}").render()


def test_pictures_stop_at_the_budget(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    album = thumbnails.Album(100_000)
    uris = [album.uri(noise) for _ in range(20)]
    assert 1 <= sum(map(bool, uris)) < 20
    assert sum(map(len, uris)) <= 100_000
    monkeypatch.setattr(data_report, "BUDGET", 0)
    assert "data:image" not in data_report.build()
    assert "no picture" in data_report.build()


def test_what_cannot_be_decoded_has_no_picture(tmp_path: Path) -> None:
    album = thumbnails.Album(10**6)
    huge = io.BytesIO()
    Image.new("1", (7_000, 7_000)).save(huge, "PNG")
    assert [album.of_bytes(data) for data in (b"", b"no image", huge.getvalue())] == ["", "", ""]
    assert album.of_file(tmp_path / "none.jpg") == ""
    assert album.of_row(None) == ""
    assert thumbnails.originals(tmp_path / "none.tar", ["a"]) == {}


@pytest.mark.parametrize(
    ("reason", "other"),
    [
        ("same pixels as base/a (1)", "base/a (1)"),
        ("looks like night/x/y (difference hash within 3 bits; ingest.near_duplicate_bits)", "night/x/y"),
        ("looks like base/b and 3 more (difference hash within 3 bits; a, b)", "base/b"),
        ("something else", None),
    ],
)
def test_the_other_one_is_read_from_the_reason(reason: str, other: str | None) -> None:
    assert sections.like(reason) == other


def test_the_command_writes_the_page_and_names_what_is_missing(project: Path) -> None:
    assert marginalia("data-report") == 0
    page = Path("reports/data.html")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert page.stat().st_size < 5_000_000
    Path("data/split/summary.json").unlink()
    assert marginalia("stage", "data_report") == 1


def test_a_browser_fetches_nothing_runs_nothing_and_fits_a_phone(project: Path) -> None:
    from tests.support.serving import browser

    atomic.write_text(Path("reports/data.html"), data_report.build())
    with browser.start() as opened:
        for width, dark in ((360, False), (1180, True)):
            opened.size(width, dark=dark)
            opened.driver.get((project / "reports/data.html").as_uri())
            opened.wait(lambda: opened.js("return document.readyState === 'complete'"))
            asked = {
                url for url in opened.requests() if not url.startswith(("data:", "chrome:"))
            }  # Chromium's own first page
            assert asked == {(project / "reports/data.html").as_uri()}
            assert opened.js("return document.documentElement.scrollWidth <= innerWidth")
            assert opened.complaints() == []
        ground, ink = (
            opened.js(f"return getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color")
        )
        assert (ground, ink) == ("rgb(18, 22, 29)", "rgb(231, 234, 240)")  # prefers-color-scheme: dark


def test_images_that_are_groups_of_their_own_are_not_listed(project: Path) -> None:
    rows = manifest.read(Path("data/split/manifest.parquet"))
    for row_groups, said in (
        ([f"g{i}" for i in range(len(rows))], "every image is a group of its own"),
        (["a", *["b"] * (len(rows) - 1)], "b152a1"),  # labelled, unlabelled, test
    ):
        grouped = [replace(row, group=group) for row, group in zip(rows, row_groups, strict=True)]
        manifest.write(Path("data/split/manifest.parquet"), grouped)
        assert said in Reader(data_report.build()).said["groups"]
