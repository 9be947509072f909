"""Captioning folders of photographs: good ones, odd ones and broken ones, with a tiny model."""

import contextlib
import hashlib
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import caption_photos
import numpy as np
import pytest
import torch
from conftest import tiny_base, tiny_model, tiny_processor
from PIL import ExifTags, Image, ImageDraw, ImageOps


GOOD = ["alpha.png", "day 1/same.jpg", "day 2/same.png", "o'Hara <b>&.WEBP", "palette.png", "turned.jpg"]
BROKEN = {
    "cut.jpg": "truncated",
    "empty.jpg": "0 bytes",
    "huge.png": "limit of 0.1 megapixels",
    "huger.png": "limit of 0.1 megapixels",
    "lost.jpg": "No such file",
    "text.jpg": "not a JPEG",
    "thin.png": "too small to judge: 4 × 300 pixels",
}


def picture(width: int = 240, height: int = 160, mode: str = "RGB") -> Image.Image:
    """Blue above green, with a red disc on the left."""
    image = Image.new("RGB", (width, height), "blue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height // 2, width, height), "green")
    draw.ellipse((width // 8, height // 4, width // 8 + height // 2, height * 3 // 4), "red")
    return image.convert(mode)


def make_folder(folder: Path) -> None:
    for name in ("day 1", "day 2", ".hidden"):
        (folder / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held upright
    picture().save(folder / "turned.jpg", exif=exif)
    picture(mode="P").save(folder / "palette.png")
    alpha = picture(mode="RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    alpha.save(folder / "alpha.png")
    picture().save(folder / "o'Hara <b>&.WEBP")
    picture().save(folder / "day 1" / "same.jpg")
    picture(160, 160).save(folder / "day 2" / "same.png")
    for name in (".hidden.jpg", ".hidden/photo.jpg"):
        picture().save(folder / name)

    picture(300, 300).save(folder / "cut.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "text.jpg").write_text("not a photograph")
    (folder / "empty.jpg").touch()
    picture(400, 300).save(folder / "huge.png")  # Pillow warns
    picture(600, 400).save(folder / "huger.png")  # Pillow raises
    picture(4, 300).save(folder / "thin.png")
    (folder / "lost.jpg").symlink_to("nowhere.jpg")
    (folder / "notes.txt").write_text("left alone")


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    files = [file for file in folder.rglob("*") if file.is_file() and "captions" not in file.parts]
    return {str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(*arguments: object) -> tuple[int, str]:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
        status = caption_photos.main([str(argument) for argument in arguments])
    return status, stderr.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def captioned(checkpoint, tmp_path_factory) -> SimpleNamespace:
    """A folder captioned once, with the results in the midst of it."""
    folder = tmp_path_factory.mktemp("photos")
    make_folder(folder)
    out, before = folder / "captions", contents(folder)
    status, stderr = run(
        folder, "--model", checkpoint, "--out", out, "--batch-size", 4, "--max-new-tokens", 4, "--max-megapixels", 0.1
    )
    return SimpleNamespace(folder=folder, out=out, before=before, status=status, stderr=stderr, checkpoint=checkpoint)


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element with a class."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.classes = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.classes = dict(attributes).get("class")

    def handle_endtag(self, tag):
        self.classes = None

    def handle_data(self, data):
        if self.classes and data.strip():
            self.texts.append((self.classes, data.strip()))


def test_broken_files_are_named_and_the_rest_go_on(captioned):
    assert contents(captioned.folder) == captioned.before  # originals are only read
    failed = {Path(line["path"]).name: line["reason"] for line in lines(captioned.out / "failed.jsonl")}
    assert captioned.status == 1
    assert sorted(failed) == sorted(BROKEN)
    for name, reason in BROKEN.items():
        assert reason in failed[name]
        assert f"{captioned.folder / name}: {failed[name]}" in captioned.stderr


def test_captions(captioned):
    records = {
        os.path.relpath(line["path"], captioned.folder): line for line in lines(captioned.out / "captions.jsonl")
    }
    assert sorted(records) == GOOD
    for record in records.values():
        assert isinstance(record["caption"], str)
        assert 1 <= record["score"]["mean"] <= 10 and record["score"]["std"] > 0
        assert record["stars"] * 2 == round(record["score"]["mean"])
        assert set(record["aspects"]) == {"underexposed", "blurred", "tilted"}
        assert Image.open(captioned.out / record["overlay"]).size == (record["width"], record["height"])
    assert (records["turned.jpg"]["width"], records["turned.jpg"]["height"]) == (160, 240)
    assert len({record["overlay"] for record in records.values()}) == len(GOOD)


def test_own_overlays_are_not_captioned(captioned):
    elsewhere = captioned.out.parent.parent / "elsewhere"
    status, _ = run(captioned.out, "--model", captioned.checkpoint, "--out", elsewhere)
    assert status == 2
    files, _ = caption_photos.find_photos([captioned.folder, captioned.folder / "alpha.png"], elsewhere)
    assert len(files) == len(GOOD) + len(BROKEN)


def test_page(captioned):
    html = (captioned.out / "gallery.html").read_text(encoding="utf-8")
    page = Page(html)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * len(GOOD)
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in images)
    assert not [tag for tag, attributes in page.tags if tag == "b" and "id" not in attributes]
    assert "default-src 'none'" in html and 'src="http' not in html
    names = [text for kind, text in page.texts if kind == "name"]
    assert sorted(names) == sorted(GOOD)
    assert all(str(captioned.folder / name) in html for name in BROKEN)
    labelled = [attributes for tag, attributes in page.tags if tag == "button"]
    assert all(attributes["aria-label"].startswith("Show where") for attributes in labelled)
    assert len(labelled) == len(GOOD)


def test_captions_are_escaped(captioned, monkeypatch, tmp_path):
    critique, caption = caption_photos.critique, '</p><script>alert("x")</script> {{ 1 }} & more'

    def hostile(*arguments, **options):
        return [{**answer, "caption": caption} for answer in critique(*arguments, **options)]

    monkeypatch.setattr(caption_photos, "critique", hostile)
    photo = captioned.folder / "day 1" / "same.jpg"
    arguments = ("--model", captioned.checkpoint, "--out", tmp_path / "out", "--limit", 1, "--max-new-tokens", 1)
    assert run(photo, captioned.folder, *arguments)[0] == 0
    html = (tmp_path / "out" / "gallery.html").read_text(encoding="utf-8")
    assert [text for kind, text in Page(html).texts if kind == "critique"] == [caption]
    assert html.count("<script>") == 1
    (line,) = lines(tmp_path / "out" / "captions.jsonl")
    assert line["caption"] == caption and line["path"] == str(photo)


def test_batches_change_nothing(captioned):
    model, processor = caption_photos.load_model(str(captioned.checkpoint), trust_remote_code=False)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64))
    images = [picture(), ImageOps.invert(picture(160, 240)), noise]
    sizes = [image.size[::-1] for image in images]
    together = caption_photos.critique(model, processor, images, sizes, max_new_tokens=6)
    for image, size, answer in zip(images, sizes, together):
        alone = caption_photos.critique(model, processor, [image], [size], max_new_tokens=6)[0]
        assert answer["caption"] == alone["caption"]
        assert answer["score"] == pytest.approx(alone["score"], abs=1e-4)
        torch.testing.assert_close(answer["heat"], alone["heat"], atol=1e-4, rtol=0)
    assert together[0]["heat"].shape == (160, 240)
    assert len({answer["score"]["mean"] for answer in together}) == len(images)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_large_photographs_are_reduced(tmp_path, mode):
    picture(6000, 3000, mode).save(tmp_path / "large.jpg")
    photo = caption_photos.read_photo(tmp_path / "large.jpg")
    assert photo.image.size == (2048, 1024) and photo.image.mode == "RGB"
    assert (photo.width, photo.height) == (6000, 3000)
    blue, green = photo.image.getpixel((2000, 100)), photo.image.getpixel((2000, 900))
    assert blue.index(max(blue)) == 2 and green.index(max(green)) == 1


def test_overlay_names_differ():
    files = [Path("a/x.jpg"), Path("b/X.png"), Path("c/x-2.jpg"), Path("x.tif")]
    names = caption_photos.overlay_names(files)
    assert names == ["x.jpg", "X-2.jpg", "x-2-2.jpg", "x-3.jpg"]


def test_home_is_expanded_where_the_shell_has_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Pictures").mkdir()
    args = caption_photos.parse_arguments(["~/Pictures", "--out", "~/captions"])
    assert args.photos == [tmp_path / "Pictures"] and args.out == tmp_path / "captions"


def test_nothing_can_be_started(captioned, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "taken").write_text("a file")
    tiny_base().save_pretrained(tmp_path / "llava")
    photo = captioned.folder / "alpha.png"
    status, stderr = run(tmp_path / "none", "--model", captioned.checkpoint, "--out", tmp_path / "out")
    assert status == 2 and "No photographs found" in stderr
    status, stderr = run(photo, "--model", tmp_path / "llava", "--out", tmp_path / "out")
    assert status == 2 and "'llava' model, not an ASE checkpoint" in stderr
    status, stderr = run(photo, "--model", tmp_path / "none", "--out", tmp_path / "out")
    assert status == 2 and "Cannot start" in stderr
    status, stderr = run(photo, "--model", captioned.checkpoint, "--out", tmp_path / "taken")
    assert status == 2 and "Cannot start" in stderr


@pytest.mark.parametrize("arguments", [["missing.jpg"], [".", "--batch-size", "0"], [".", "--out", "."]])
def test_wrong_arguments(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overlays").mkdir()  # somebody's photographs may be in it
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
