"""The page: an index that says the truth, and a browser that shows it."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import gallery
import pytest
from photo_files import Failure, Photo, Stamp
from photo_library import Library
from PIL import Image


ALBUM = "An <album>"
HOSTILE = '</script><script>alert("x")</script> {{ 1 }} & \u2028 "so"'


def make_library(tmp_path: Path, count: int) -> Library:
    """Photographs of rising scores; the first has an odd name and caption."""
    library = Library(tmp_path / "out", "")
    library.begin_run("a-model", {})
    image, files, results = Image.new("RGB", (20, 30)), [], []
    for number in range(count):
        name = f"{ALBUM}/50% #1 <b>?.jpg" if number == 0 else f"{ALBUM}/photo {number}.jpg"
        stamp = Stamp(1, 1, f"{number:064}")
        files.append(Photo(tmp_path / name, image, 20, 30, stamp, f"2024-01-01T00:{number % 60:02}:00"))
        caption = HOSTILE if number == 0 else f"Soft light, number {number}."
        aspects = {"too_dark": 0.9 if number % 2 else 0.1, "blurred": 0.6}
        row = {"caption": caption, "score": 2 + 7 * number / count, "std": 1.26, "aspects": json.dumps(aspects)}
        row |= {"sha256": stamp.sha256, "width": 20, "height": 30, "thumbnail": "gallery/thumbs/t.jpg"}
        results.append(row | {"overlay": f"overlays/50% #{number}.jpg", "note": "cut" if number == 1 else None})
    library.add([*files, Failure(tmp_path / "<i>.jpg", "damaged & <b>")], results)
    return library


def export(tmp_path: Path, count: int) -> str:
    with make_library(tmp_path, count) as library:
        page, aside = gallery.export(library, Counter({"GIF": 3}), "1 May 2026")
    assert aside == [] and page == tmp_path / "out" / "gallery.html"
    return page.read_text(encoding="utf-8")


def index(out: Path) -> list[list]:
    text = (out / "gallery" / "index.js").read_text(encoding="ascii")
    return json.loads(re.sub(r",?\n\];\n$", "]", text.removeprefix("const photographs = ")))


class Page(HTMLParser):
    """The texts of all elements, and all addresses."""

    def __init__(self, html: str):
        super().__init__()
        self.texts, self.addresses, self.tags = [], [], Counter()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_index_holds_all_that_is_shown(tmp_path):
    export(tmp_path, 3)
    rows = index(tmp_path / "out")
    assert [row[0] for row in rows] == ["50% #1 <b>?.jpg", "photo 1.jpg", "photo 2.jpg"]
    _, _, caption, mean, shown, spread, stars, aspects, width, height, thumbnail, overlay, taken, note = rows[1]
    assert (caption, mean, shown, spread, stars) == ("Soft light, number 1.", 2 + 7 / 3, 4.3, 1.3, 2.0)
    assert aspects == ["too dark", "blurred"] and rows[0][7] == ["blurred"]
    assert (width, height, taken, note) == (20, 30, "2024-01-01T00:01:00", "cut")
    assert (thumbnail, overlay) == ("gallery/thumbs/t.jpg", "overlays/50%25%20%231.jpg")
    assert rows[0][2] == HOSTILE
    for row in rows:
        assert (tmp_path / "out" / unquote(row[1])).resolve() == tmp_path / ALBUM / row[0]


def test_a_score_is_rounded_once(tmp_path):
    with make_library(tmp_path, 1) as library:
        library.database.execute("UPDATE result SET score = 8.249")  # 8.25 by two digits, and that 8.3 in a browser
        (row,) = gallery.index_rows(library, gallery.common_folder(library))
    assert row[3:5] == [8.249, 8.2]


def test_the_title_is_of_all_that_is_shown(tmp_path):
    with make_library(tmp_path, 2) as library:
        assert gallery.title_of(gallery.common_folder(library)) == ALBUM
        other = Photo(tmp_path / "summer_trip" / "a.jpg", Image.new("RGB", (2, 2)), 2, 2, Stamp(1, 1, f"{0:064}"))
        library.add([other])
        assert gallery.title_of(gallery.common_folder(library)) == tmp_path.name.replace("_", " ").replace("-", " ")
        library.add([Photo(Path("/elsewhere/a.jpg"), other.image, 2, 2, other.stamp)])
        assert gallery.title_of(gallery.common_folder(library)) == "Photographs"


def test_lines_are_those_of_the_library(tmp_path):
    export(tmp_path, 2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "path": str(tmp_path / ALBUM / "photo 1.jpg"),
        "caption": "Soft light, number 1.",
        "score": {"mean": 5.5, "std": 1.26},
        "stars": 3.0,
        "aspects": {"too_dark": 0.9, "blurred": 0.6},
        "width": 20,
        "height": 30,
        "overlay": "overlays/50% #1.jpg",
        "model": "a-model",
        "taken_at": "2024-01-01T00:01:00",
        "note": "cut",
    }
    failed = (tmp_path / "out" / "failed.jsonl").read_text()
    assert json.loads(failed) == {"path": str(tmp_path / "<i>.jpg"), "reason": "damaged & <b>"}


def test_the_page_names_failures_and_what_was_left_out_and_asks_no_network(tmp_path):
    html = export(tmp_path, 2)
    page = Page(html)
    assert str(tmp_path / "<i>.jpg") in page.texts and "damaged & <b>" in page.texts and "3 × GIF" in page.texts
    assert page.texts.count("An <album>") == 1 and "1 file could not be captioned." in page.texts
    assert "critiqued by a-model on 1\u00a0May\u00a02026" in html
    assert not [one for one in page.addresses if one and re.match(r"(https?:)?//", one)]
    assert "default-src 'none'" in html and page.tags["script"] == 2


def test_a_page_of_nothing(tmp_path):
    html = export(tmp_path, 0)
    assert "No photograph could be captioned." in html and Page(html).tags["script"] == 0
    assert index(tmp_path / "out") == []


def test_many_failures_are_counted_and_some_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "LISTED", 2)
    with make_library(tmp_path, 1) as library:
        library.add([Failure(tmp_path / f"x{number}.jpg", "damaged") for number in range(4)])
        gallery.export(library, Counter(), "")
    html = (tmp_path / "out" / "gallery.html").read_text()
    assert "5 files could not be captioned" in html and "And 3 more" in html and html.count("<dt>") == 2
    assert len((tmp_path / "out" / "failed.jsonl").read_text().splitlines()) == 5


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path):
    """The page as a browser has it after a script of ours ran on it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")

    def look(html: str, script: str) -> str:
        page = tmp_path / "out" / "look.html"
        page.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, timeout=120, check=True)
        return done.stdout.decode()

    return look


@pytest.mark.slow
def test_a_browser_filters_sorts_and_pages(tmp_path, seen):
    """All in one visit: a browser takes seconds to start."""
    html = export(tmp_path, 450)
    dom = seen(
        html,
        """
const said = [], say = () => said.push([count.textContent, place.textContent, sheet.children.length,
  sheet.querySelector(".name a").textContent, earlier.disabled, later.disabled]);
const put = (element, value, event) => { element.value = value; element.dispatchEvent(new Event(event)); };
say();
later.click(); later.click(); say();
put(order, "worst", "change"); say();
put(words, "NUMBER 44", "input"); say();
put(aspect, "too dark", "change"); say();
put(words, "", "input"); put(least, "8.5", "input"); put(order, "name", "change"); say();
put(least, "1", "input"); put(aspect, "", "change"); put(words, "alert", "input"); say();
const reveal = sheet.querySelector(".reveal");
const before = sheet.querySelector(".overlay").hasAttribute("src");
reveal.focus(); reveal.click();
said.push([before, sheet.querySelector(".overlay").getAttribute("src"), reveal.getAttribute("aria-pressed")]);
put(words, "", "input"); put(order, "name", "change");
const press = (where, key) => where.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
sheet.querySelector(".reveal").focus(); press(document.activeElement, "ArrowRight");
said.push([document.activeElement.getAttribute("aria-label")]);
press(document.body, "/"); said.push([document.activeElement.id]);
put(words, "no such words", "input"); said.push([none.hidden, sheet.children.length]);
document.body.replaceChildren(JSON.stringify(said));
""",
    )
    (text,) = [text for text in Page(dom).texts if text.startswith("[[")]
    assert json.loads(text) == [
        ["450 of 450 shown", "1 to 200 of 450", 200, "photo 449.jpg", True, False],
        ["450 of 450 shown", "401 to 450 of 450", 50, "photo 49.jpg", False, True],
        ["450 of 450 shown", "1 to 200 of 450", 200, "50% #1 <b>?.jpg", True, False],
        ["14 of 450 shown", "1 to 14 of 14", 14, "photo 44.jpg", True, True],
        ["5 of 450 shown", "1 to 5 of 5", 5, "photo 441.jpg", True, True],
        ["18 of 450 shown", "1 to 18 of 18", 18, "photo 415.jpg", True, True],  # of 8.456: it says 8.5
        ["1 of 450 shown", "1 to 1 of 1", 1, "50% #1 <b>?.jpg", True, True],
        [False, "overlays/50%25%20%230.jpg", "true"],
        ["Show where the model looked in photo 1.jpg"],
        ["words"],
        [False, 0],
    ]
