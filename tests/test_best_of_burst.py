"""Bursts: the sharp frame is found, and what belongs together stays whole."""

import contextlib
import json
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import best_of_burst
import numpy as np
import pytest
from burst_frames import Exposure, number_in, read_exposure, shift_between
from conftest import landscape
from photo_features import hash_distance, perceptual_hash
from photo_files import Photo, read_photo
from photo_library import Library
from PIL import ExifTags, Image, ImageDraw, ImageEnhance, ImageFilter


SCENE = landscape(np.random.default_rng(0))
OTHER = landscape(np.random.default_rng(1))
BLUR = ImageFilter.GaussianBlur(1.5)


def handheld(seed: int, scene: Image.Image = SCENE) -> Image.Image:
    """The scene as the next frame of a burst has it: moved by up to 2%, in slightly other light."""
    generator = np.random.default_rng(seed)
    left, top = (int(generator.uniform(0, 0.02) * length) for length in scene.size)
    frame = scene.crop((left, top, left + int(0.98 * scene.width), top + int(0.98 * scene.height)))
    return ImageEnhance.Brightness(frame).enhance(generator.uniform(0.95, 1.05))


def halves(blur_left: bool) -> Image.Image:
    """Out of focus on one side, as the near and the far frame of a focus stack."""
    mask = Image.new("L", SCENE.size, 0 if blur_left else 255)
    mask.paste(255 if blur_left else 0, (0, 0, SCENE.width // 2, SCENE.height))
    return Image.composite(SCENE.filter(BLUR), SCENE, mask)


def with_walker(place: float) -> Image.Image:
    """Somebody in a plain coat, who walks through the picture."""
    frame = handheld(int(100 * place))
    left = int(place * frame.width)
    ImageDraw.Draw(frame).rectangle((left, 180, left + 25, 270), "dimgrey")
    return frame


class Album:
    """Photographs on disk and in a library, each with a score of its own."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder / "photos", folder / "out"
        self.folder.mkdir()

    def add(self, name: str, image: Image.Image, second: float | None = 0, score: float = 6.0, **exif: object) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        tags = Image.Exif()
        details = tags.get_ifd(ExifTags.IFD.Exif)
        details.update({ExifTags.Base[tag]: value for tag, value in exif.items()})
        if second is not None:
            details[ExifTags.Base.DateTimeOriginal] = f"2024:05:06 07:{int(second) // 60:02}:{int(second) % 60:02}"
        image.save(path, exif=tags)
        photo = read_photo(path)
        assert isinstance(photo, Photo)
        row = {"sha256": photo.stamp.sha256, "caption": "", "score": score, "std": 1.0, "aspects": "{}"}
        row |= {"width": 1, "height": 1, "overlay": "o", "thumbnail": "t", "phash": perceptual_hash(photo.image)}
        with Library(self.out, "") as library:
            library.begin_run("m", {})
            library.add([photo], [row])
        return path

    def series(self, *images: Image.Image, scores: list[float] | None = None, **exif: list) -> None:
        """Frames a, b, c ... one a second."""
        for number, image in enumerate(images):
            own = {tag: values[number] for tag, values in exif.items()}
            self.add(f"{'abcdefgh'[number]}.jpg", image, number, scores[number] if scores else 6.0, **own)


@pytest.fixture
def album(tmp_path) -> Album:
    return Album(tmp_path)


@pytest.fixture
def groups(album, capsys) -> Callable[..., list[dict]]:
    def found(*arguments: object) -> list[dict]:
        assert best_of_burst.main([str(album.out), "--json", *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return found


def names(group: dict) -> list[str]:
    return [os.path.basename(frame["paths"][0]) for frame in group["frames"]]


# Likeness ------------------------------------------------------------------------------------------------------------


def test_known_pairs():
    scenes = [landscape(np.random.default_rng(seed)) for seed in range(8)]
    hashes = [perceptual_hash(scene) for scene in scenes]
    for number, scene in enumerate(scenes):
        for same in (handheld(number, scene), scene.filter(BLUR), scene.resize((1000, 700)), scene.convert("L")):
            assert hash_distance(hashes[number], perceptual_hash(same)) <= best_of_burst.ALIKE
        assert all(hash_distance(hashes[number], other) > best_of_burst.ALIKE for other in hashes[:number])
    assert perceptual_hash(Image.new("RGB", (300, 200), "grey")) == "0" * 16
    assert hash_distance("0" * 16, "f" * 16) == 64 and hash_distance("0f" * 8, "0e" * 8) == 8


def test_groups_by_time_and_look(album, groups):
    album.series(handheld(0), handheld(1), handheld(2))
    album.add("later.jpg", handheld(3), second=60)
    album.add("meanwhile.jpg", OTHER, second=1)
    album.add("timeless.jpg", handheld(4), second=None)
    (group,) = groups()
    assert group["kind"] == "burst" and sorted(names(group)) == ["a.jpg", "b.jpg", "c.jpg"]
    (group,) = groups("--window", 100)
    assert len(group["frames"]) == 4
    assert groups("--window", 0.5) == []


def test_a_fast_search_finds_the_pairs_of_a_slow_one():
    generator = np.random.default_rng(0)
    start, base = datetime(2024, 1, 1), generator.integers(0, 256, 8, dtype=np.uint8)
    frames = []
    for number in range(60):
        flips = np.packbits(generator.random(64) < 0.12)
        taken = start + timedelta(seconds=float(generator.uniform(0, 120)))
        frames.append(best_of_burst.Frame([str(number)], str(number), 5.0, (base ^ flips).tobytes().hex(), taken))
    frames.sort(key=lambda frame: frame.taken)
    linked = {number: {number} for number in range(60)}
    for i in range(60):
        for j in range(i):
            near = abs((frames[i].taken - frames[j].taken).total_seconds()) <= 4
            if near and hash_distance(frames[i].phash, frames[j].phash) <= best_of_burst.ALIKE:
                union = linked[i] | linked[j]
                for number in union:
                    linked[number] = union
    slow = {frozenset(frames[number].sha256 for number in group) for group in linked.values() if len(group) > 1}
    found = best_of_burst.find_groups(frames, 4)
    assert {frozenset(frame.sha256 for frame in group.frames) for group in found.groups} == slow
    assert len(slow) > 5 and len(found.alone) == 60 - sum(map(len, slow))


def test_one_photograph_in_several_files_is_no_burst(album, groups):
    album.add("a.jpg", SCENE)
    album.add("a.png", SCENE)  # as a raw file beside its JPEG
    (album.folder / "copies").mkdir()
    album.add("copies/x.jpg", SCENE)
    assert groups() == []
    album.add("b.jpg", handheld(1).filter(BLUR), second=1)
    (group,) = groups()
    assert [len(frame["paths"]) for frame in group["frames"]] == [3, 1]


# The best ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", ["focus", "shake"])
def test_the_sharp_one_whatever_the_scores(album, groups, fault, seed):
    scene = landscape(np.random.default_rng(10 + seed))
    soft = handheld(1, scene).filter(BLUR)
    if fault == "shake":
        pixels = np.asarray(handheld(1, scene), np.float32)
        soft = Image.fromarray(np.mean([np.roll(pixels, step, 1) for step in range(5)], 0).astype(np.uint8))
    album.series(soft, handheld(2, scene), handheld(3, scene).filter(BLUR), scores=[9.0, 5.0, 8.0])
    (group,) = groups()
    assert names(group)[0] == "b.jpg" and [frame["kept"] for frame in group["frames"]] == [True, False, False]
    assert [frame["reason"] for frame in group["frames"]] == ["best", "less sharp", "less sharp"]
    assert group["frames"][0]["sharpness"] == 1 and group["frames"][1]["sharpness"] < best_of_burst.SOFT


def test_of_equally_sharp_ones_the_higher_score(album, groups):
    album.series(handheld(0), handheld(1), handheld(2).filter(BLUR), scores=[5.0, 7.0, 9.0])
    (group,) = groups()
    assert names(group) == ["b.jpg", "a.jpg", "c.jpg"]
    assert [frame["reason"] for frame in group["frames"]] == ["best", "as sharp, lower score", "less sharp"]


# What stays whole ----------------------------------------------------------------------------------------------------


def test_a_bracket_by_correction(album, groups):
    album.series(handheld(0), handheld(1), handheld(2), ExposureBiasValue=[-1.0, 0.0, 1.0])
    (group,) = groups()
    assert group["kind"] == "set" and "corrections 2.0 EV apart" in group["whole"]
    assert all(frame["kept"] for frame in group["frames"])


def test_a_bracket_by_time(album, groups):
    album.series(handheld(0), handheld(1), ExposureTime=[1 / 125, 1 / 60], ISOSpeedRatings=[100, 100], FNumber=[8, 8])
    assert "exposures 1.1 EV apart" in groups()[0]["whole"]


def test_a_camera_that_follows_the_light_is_no_bracket(album, groups):
    album.series(handheld(0), handheld(1), ExposureTime=[1 / 125, 1 / 60], ISOSpeedRatings=[200, 100], FNumber=[8, 8])
    assert groups()[0]["kind"] == "burst"


def test_a_bracket_that_the_camera_names(album, groups):
    album.series(handheld(0), handheld(1), ExposureMode=[2, 2])
    assert "set to a bracket" in groups()[0]["whole"]


def test_a_bracket_without_exif(album, groups):
    album.series(*(ImageEnhance.Brightness(handheld(n)).enhance(light) for n, light in enumerate((0.5, 0.8, 1.2))))
    assert "no exposure in EXIF" in groups()[0]["whole"]


def test_a_focus_stack(album, groups):
    album.series(halves(True), SCENE.filter(ImageFilter.GaussianBlur(0.8)), halves(False))
    assert "sharp in different places" in groups()[0]["whole"]


@pytest.mark.parametrize("upright", [False, True])
def test_a_panorama(album, groups, upright):
    width, height = (0, 0.05) if upright else (0.05, 0)
    wide = landscape(np.random.default_rng(5)).resize((960, 720))
    boxes = [(int(n * width * 960), int(n * height * 720)) for n in range(5)]
    album.series(*(wide.crop((left, top, left + 760, top + 560)) for left, top in boxes))
    found = groups()  # what overlaps less is alone, and kept as well
    assert found and all("the view moves on" in group["whole"] for group in found)


def test_somebody_who_walks_by_is_no_panorama(album, groups):
    album.series(*map(with_walker, (0.2, 0.4, 0.6)))
    assert groups()[0]["kind"] == "burst"


def test_how_far_the_view_moved():
    light = np.asarray(SCENE.convert("L"), np.float32)
    first, second = light[:, :400], light[20:, 60:460]
    assert shift_between(first[:-20], second) == pytest.approx((-60 / 400, -20 / 340), abs=0.01)
    assert shift_between(first, first) == (0, 0)
    assert shift_between(first, np.asarray(OTHER.convert("L"), np.float32)[:, :400]) is None


@pytest.mark.parametrize("value", [(0, 0), "fast", None, float("nan")])
def test_exposures_that_say_nothing(value, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"nothing"
    SCENE.save(tmp_path / "a.jpg", exif=exif)
    assert read_exposure(tmp_path / "a.jpg") == Exposure()
    (tmp_path / "b.jpg").write_text("no picture")
    assert read_exposure(tmp_path / "b.jpg") == Exposure()
    assert number_in(value) is None


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_photograph_that_is_gone_keeps_its_group_whole(album, capsys):
    album.series(handheld(0), handheld(1).filter(BLUR))
    (album.folder / "a.jpg").unlink()
    assert best_of_burst.main([str(album.out)]) == 1
    said = capsys.readouterr()
    assert "kept whole: 1 of them cannot be read" in said.out and "a.jpg: No such file" in said.err


def test_the_list_holds_all_but_the_outdone(album, capsys):
    album.series(handheld(0).filter(BLUR), handheld(1))
    album.add("alone.jpg", OTHER, second=500)
    album.add("timeless.jpg", OTHER.transpose(Image.Transpose.ROTATE_180), second=None)
    before = sorted(album.folder.rglob("*"))
    target = album.out.parent / "keep.txt"
    assert best_of_burst.main([str(album.out), "--list", str(target)]) == 0
    said = capsys.readouterr().out
    assert "Bursts: 1, 1 photographs in them are outdone." in said and "1 of these tell no time of taking" in said
    assert [Path(line).name for line in target.read_text().splitlines()] == ["alone.jpg", "b.jpg", "timeless.jpg"]
    assert sorted(album.folder.rglob("*")) == before
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        best_of_burst.main([str(album.out), "--list", str(target)])
    assert len(target.read_text().splitlines()) == 3


def test_a_library_that_is_not_there(tmp_path, capsys):
    assert best_of_burst.main([str(tmp_path / "none")]) == 2
    assert "There is no library" in capsys.readouterr().err
