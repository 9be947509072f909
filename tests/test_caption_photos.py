"""Captioning folders of photographs: good ones, odd ones and broken ones, with a tiny model."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import caption_photos
import numpy as np
import photo_files
import photo_library
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


def test_broken_files_are_named_and_the_rest_go_on(captioned):
    assert contents(captioned.folder) == captioned.before  # originals are only read
    failed = {Path(line["path"]).name: line["reason"] for line in lines(captioned.out / "failed.jsonl")}
    assert captioned.status == 1
    assert sorted(failed) == sorted(BROKEN)
    for name, reason in BROKEN.items():
        assert reason in failed[name]
        assert f"{captioned.folder / name}: {failed[name]}" in captioned.stderr


def test_some_may_fail_if_it_is_said_so_and_not_all(captioned, tmp_path):
    for name in ("text.jpg", GOOD[0]):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(captioned.folder / name, tmp_path / "photos" / name)
        options = ["--model", captioned.checkpoint, "--out", tmp_path / "out", "--max-new-tokens", 4]
        status, stderr = run(tmp_path / "photos", *options, "--some-may-fail")
        assert status == (1 if name == "text.jpg" else 0) and "text.jpg: not a JPEG" in stderr
    assert run(tmp_path / "photos", *options)[0] == 1


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


def test_own_results_are_not_captioned(captioned):
    elsewhere = captioned.out.parent.parent / "elsewhere"
    status, stderr = run(captioned.out, "--model", captioned.checkpoint, "--out", elsewhere)
    assert status == 2 and "No photographs found" in stderr
    overlay = next((captioned.out / "overlays").iterdir())
    found = photo_files.find_photos([captioned.folder, captioned.folder / "alpha.png", overlay])
    assert len(found.files) == len(GOOD) + len(BROKEN)
    assert found.left_out == {
        "hidden file": 1,
        "hidden folder": 1,
        "other file": 6,  # the notes, and the library with its exports
        "folder of results of this program": 2,
        "result of this program": 1,
    }


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
    photo = photo_files.read_photo(tmp_path / "large.jpg")
    assert photo.image.size == (2048, 1024) and photo.image.mode == "RGB"
    assert (photo.width, photo.height) == (6000, 3000)
    blue, green = photo.image.getpixel((2000, 100)), photo.image.getpixel((2000, 900))
    assert blue.index(max(blue)) == 2 and green.index(max(green)) == 1


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
    shutil.copytree(captioned.checkpoint, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    status, stderr = run(photo, "--model", tmp_path / "cut", "--out", tmp_path / "out")
    assert status == 2 and "cut cannot be loaded" in stderr


@pytest.mark.parametrize(
    "arguments", [["missing.jpg"], [".", "--batch-size", "0"], [".", "--max-megapixels", "inf"], [".", "--overwrite"]]
)
def test_wrong_arguments(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


# Runs that end early, and the next ones ---------------------------------------------------------------------------


class Critic:
    """Stands for model and processor: answers at once, and counts what it was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: Path):
        self.loads, self.log, self.act = 0, log, lambda number: None
        monkeypatch.setattr(caption_photos, "load_model", self.load)
        monkeypatch.setattr(caption_photos, "critique", self.critique)
        monkeypatch.setattr(caption_photos, "pooled_features", lambda model, processor, image: b"12")

    def load(self, name: str, trust_remote_code: bool) -> tuple["Critic", "Critic"]:
        self.loads += 1
        return self, self

    def num_parameters(self) -> int:
        return 1

    def overlay_saliency(self, image: Image.Image, heat: object) -> Image.Image:
        return image

    def critique(self, model, processor, images, sizes, max_new_tokens) -> list[dict[str, Any]]:
        self.act(len(self.seen()))
        with open(self.log, "a") as log:  # a file: what a killed process saw must not be lost
            log.writelines(f"{image.getpixel((0, 0))}\n" for image in images)
        answer = {"score": {"mean": 7.0, "std": 1.0}, "aspects": {"blurred": 0.75}, "heat": None}
        return [{"caption": f"Colour {image.getpixel((0, 0))}.", **answer} for image in images]

    def seen(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def critic(monkeypatch, tmp_path) -> Critic:
    return Critic(monkeypatch, tmp_path / "seen.txt")


@pytest.fixture
def album(tmp_path) -> Path:
    """Ten photographs, no two alike."""
    (tmp_path / "album").mkdir()
    for number in range(10):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(tmp_path / "album" / f"{number}.png")
    return tmp_path / "album"


@pytest.fixture
def again(checkpoint, album, tmp_path) -> Callable[..., tuple[int, str]]:
    """The same command, each time."""
    return lambda *more: run(album, "--model", checkpoint, "--out", tmp_path / "out", "--batch-size", 3, *more)


def query(out: Path, question: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(out / "library.sqlite")) as database:
        return database.execute(question).fetchall()


def test_an_unchanged_library_loads_no_model(again, critic, album, tmp_path):
    assert again()[0] == 0 and critic.loads == 1
    first = (tmp_path / "out" / "captions.jsonl").read_text()
    assert [Path(json.loads(line)["path"]).name for line in first.splitlines()] == [f"{n}.png" for n in range(10)]
    assert again("--limit", 2)[0] == 0 and critic.loads == 1  # and what it does not ask for stays on the page
    assert (tmp_path / "out" / "captions.jsonl").read_text() == first
    Image.new("RGB", (20, 20), "blue").save(album / "3.png")  # edited
    assert again()[0] == 0 and critic.loads == 2
    assert critic.seen()[10:] == ["(0, 0, 255)"]
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 10


def test_moved_photographs_and_copies_are_not_captioned_again(again, critic, album, tmp_path):
    shutil.copy(album / "1.png", album / "copy.png")
    again()
    assert len(critic.seen()) == 10
    (album / "moved").mkdir()
    (album / "0.png").rename(album / "moved" / "zero.png")
    (album / "2.png").unlink()
    os.utime(album / "4.png", (0, 0))
    assert again()[0] == 0 and critic.loads == 1
    names = [os.path.relpath(line["path"], album) for line in lines(tmp_path / "out" / "captions.jsonl")]
    assert names == ["1.png", *(f"{n}.png" for n in range(3, 10)), "copy.png", "moved/zero.png"]


def test_another_run_destroys_nothing(again, critic, tmp_path):
    again()
    again("--max-new-tokens", 5)
    again("--max-new-tokens", 5, "--fresh")
    assert len(critic.seen()) == 30 and critic.loads == 3
    assert query(tmp_path / "out", "SELECT run, count(*) FROM result GROUP BY run") == [(1, 10), (2, 10), (3, 10)]
    assert again()[0] == 0 and critic.loads == 3  # the first run's results are still known
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 30
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 10


def test_other_weights_are_another_run(again, critic, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    model, out = ("--model", tmp_path / "tuned"), tmp_path / "out"
    again(*model)
    (tmp_path / "tuned" / "README.md").write_text("says nothing to the model")
    again(*model)
    assert len(critic.seen()) == 10
    content = bytearray((tmp_path / "tuned" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "tuned" / "model.safetensors").write_bytes(content)
    again(*model)
    assert len(critic.seen()) == 20 and query(out, "SELECT count(*) FROM run") == [(2,)]


def test_ctrl_c_leaves_a_page_and_the_same_command_goes_on(again, critic, tmp_path):
    def interrupt(number: int):
        if number == 6:
            raise KeyboardInterrupt

    critic.act = interrupt
    status, stderr = again()
    assert status == 1 and "Stopped: interrupted" in stderr and "Traceback" not in stderr
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 6 and (tmp_path / "out" / "gallery.html").exists()
    critic.act = lambda number: None
    assert again()[0] == 0
    assert len(critic.seen()) == len(set(critic.seen())) == 10
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_moment_it_goes_on(again, critic, tmp_path):
    critic.act = lambda number: time.sleep(0.1)
    generator, kills = random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            os._exit(again()[0])
        for _ in range(generator.randrange(2, 40) if kills < 8 else 10_000):
            time.sleep(0.01)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0
        break
    assert kills > 0
    out = tmp_path / "out"
    assert query(out, "PRAGMA integrity_check") == [("ok",)]
    assert query(out, "SELECT count(*), count(DISTINCT sha256) FROM result") == [(10, 10)]
    assert query(out, "SELECT count(*) FROM words WHERE words MATCH 'colour'") == [(10,)]
    assert len(critic.seen()) <= 10 + 3 * kills and len(set(critic.seen())) == 10
    records = lines(out / "captions.jsonl")
    assert len(records) == 10
    for record in records:
        Image.open(out / record["overlay"]).load()
    assert len(list((out / "overlays").glob("*.jpg"))) == 10


@pytest.mark.parametrize("when", ["overlay", "transaction", "export"])
def test_a_full_disk_leaves_what_was_written_whole(when, again, critic, monkeypatch, tmp_path):
    again("--limit", 4)
    before = (tmp_path / "out" / "captions.jsonl").read_text()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments, **options):
        raise sqlite3.OperationalError("database or disk is full") if when == "transaction" else full

    place = {"overlay": "caption_photos.save_jpeg", "transaction": "photo_library.Library.add", "export": "os.fsync"}
    with monkeypatch.context() as patch:
        patch.setattr(place[when], fail)
        status, stderr = again()
    assert status == 1 and "Traceback" not in stderr
    assert "Stopped" in stderr and ("No space left" in stderr or "disk is full" in stderr)
    assert (tmp_path / "out" / "captions.jsonl").read_text() == before
    assert again()[0] == 0
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 10
    assert not list((tmp_path / "out").rglob("*.part"))


def test_captions_of_an_earlier_form_get_features_and_stay(again, critic, album, tmp_path):
    again("--limit", 4)
    out = tmp_path / "out"
    with contextlib.closing(sqlite3.connect(out / "library.sqlite")) as database:
        columns = "ALTER TABLE result DROP COLUMN embedding; ALTER TABLE result DROP COLUMN phash;"
        database.executescript(f"{columns} PRAGMA user_version = 1")
    assert again("--limit", 5)[0] == 0
    assert len(critic.seen()) == len(set(critic.seen())) == 5
    question = "SELECT count(*), count(DISTINCT phash), count(embedding), count(caption) FROM result"
    assert query(out, question) == [(5, 1, 5, 5)]
    assert again("--limit", 5)[0] == 0 and critic.loads == 2


def test_features_of_a_tiny_model(captioned):
    rows = query(captioned.out, "SELECT phash, length(embedding) FROM result ORDER BY id")
    assert len(rows) == len(GOOD) and {length for _, length in rows} == {2 * 32}
    assert all(len(phash) == 16 for phash, _ in rows)


def test_what_the_model_cannot_do_costs_that_photograph_alone(again, critic, monkeypatch, tmp_path):
    answer = caption_photos.critique

    def fails(model, processor, images, *arguments, **options):
        if any(image.getpixel((0, 0)) == (80, 0, 0) for image in images):
            raise RuntimeError("out of memory\nand much more")
        return answer(model, processor, images, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(caption_photos, "critique", fails)
        status, stderr = again()
    assert status == 1 and "4.png: the model failed: out of memory\n" in stderr
    assert len(critic.seen()) == 9
    assert [line["reason"] for line in lines(tmp_path / "out" / "failed.jsonl")] == ["the model failed: out of memory"]
    assert again()[0] == 0 and len(critic.seen()) == 10  # tried again
    assert lines(tmp_path / "out" / "failed.jsonl") == []


def test_two_runs_at_once(again, critic, tmp_path):
    with photo_library.Library(tmp_path / "out", "caption_photos.py elsewhere"):
        status, stderr = again()
    assert status == 2 and f"process {os.getpid()} on " in stderr and "caption_photos.py elsewhere" in stderr
    assert critic.loads == 0 and again()[0] == 0


def test_small_models_work_on_one_core(again, critic):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again()
        assert torch.get_num_threads() == 1
        again("--fresh", "--threads", 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
def test_sidecars_are_written_when_asked_for(again, critic, album):
    again()
    assert not list(album.glob("*.xmp"))
    assert again("--limit", 2, "--xmp")[0] == 0 and critic.loads == 1
    assert sorted(file.name for file in album.glob("*.xmp")) == ["0.png.xmp", "1.png.xmp"]
    (album / "0.png.xmp").write_text("cut")
    status, stderr = again("--limit", 3, "--xmp", "photo.xmp")
    assert status == 1 and "0.png: no sidecar: 0.png.xmp is cut short" in stderr
    assert (album / "0.png.xmp").read_text() == "cut" and (album / "2.xmp").exists()
    assert not (album / "1.xmp").exists()


def test_sidecars_need_exiftool(again, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        again("--xmp")
    assert stopped.value.code == 2
