"""Photographs as they lie in people's folders: every kind is read, or left out and counted."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import photo_files
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene(width: int = 120, height: int = 80) -> Image.Image:
    """Light and coloured at every edge, so that it has no border of its own, and no side like another."""
    image = Image.new("RGB", (width, height), (90, 140, 200))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height // 2, width, height), (60, 130, 70))
    draw.ellipse((width // 8, height // 4, width // 2, height * 3 // 4), (210, 60, 50))
    return image


def assert_reads_as(path: Path, expected: Image.Image, tolerance: float = 6) -> photo_files.Photo:
    photo = photo_files.read_photo(path)
    assert isinstance(photo, photo_files.Photo), photo
    assert photo.image.mode == "RGB" and photo.image.size == expected.size
    difference = np.abs(np.asarray(photo.image, dtype=float) - np.asarray(expected, dtype=float)).mean()
    assert difference < tolerance
    return photo


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "heic"])
def test_every_kind_in_every_orientation(suffix, orientation, tmp_path):
    if f".{suffix}" not in photo_files.SUFFIXES:
        pytest.skip(f"nothing here reads {suffix}")
    kept = scene() if orientation == 1 else scene().transpose(TURNS[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    kept.save(tmp_path / f"photo.{suffix}", exif=exif.tobytes(), quality=95)
    photo = assert_reads_as(tmp_path / f"photo.{suffix}", scene())
    assert (photo.width, photo.height) == (120, 80)
    assert photo.taken_at == "2024-05-06T07:08:09" and photo.note is None


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0II*\0"])
def test_broken_exif_costs_no_photograph(exif, tmp_path):
    scene().save(tmp_path / "odd.jpg", exif=exif)
    assert assert_reads_as(tmp_path / "odd.jpg", scene()).taken_at is None


def test_two_pictures_in_one_file_are_its_first(tmp_path):
    """As some cameras keep a preview behind the photograph, or both eyes of a stereo view."""
    scene().save(tmp_path / "both.jpg", "MPO", save_all=True, append_images=[scene(60, 40)])
    assert_reads_as(tmp_path / "both.jpg", scene())


class Raw:
    """What rawpy gives of a raw file: sizes as on the sensor, how the camera was held, a preview, the picture."""

    class LibRawNoThumbnailError(Exception):
        pass

    class LibRawUnsupportedThumbnailError(Exception):
        pass

    ThumbFormat = SimpleNamespace(JPEG="jpeg", BITMAP="bitmap")

    def __init__(self, preview: Image.Image | None, flip: int, exif: bytes = b""):
        self.preview, self.exif = preview, exif
        self.sizes = SimpleNamespace(width=3000, height=2000, flip=flip)

    def imread(self, path: str) -> "Raw":
        return self

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *exception: object):
        pass

    def extract_thumb(self) -> SimpleNamespace:
        if self.preview is None:
            raise self.LibRawNoThumbnailError
        buffer = io.BytesIO()
        self.preview.save(buffer, "JPEG", quality=95, exif=self.exif)
        return SimpleNamespace(format="jpeg", data=buffer.getvalue())

    def postprocess(self, half_size: bool, use_camera_wb: bool) -> np.ndarray:
        assert half_size and use_camera_wb
        developed = ImageOps.invert(scene(1500, 1000))  # told from the preview
        return np.asarray(developed.transpose(TURNS[8]) if self.sizes.flip == 6 else developed)


@pytest.fixture
def raw_file(tmp_path) -> Path:
    """With the tiny picture inside that Pillow would take for the photograph."""
    tags = ImageFileDirectory_v2()
    tags[254] = 1  # a reduced copy
    scene(160, 120).save(tmp_path / "DSC_0001.NEF", format="TIFF", tiffinfo=tags)
    return tmp_path / "DSC_0001.NEF"


@pytest.mark.parametrize("flip, orientation", [(0, 1), (3, 3), (5, 8), (6, 6)])
@pytest.mark.parametrize("says", [True, False], ids=["preview-says", "raw-says"])
def test_a_raw_file_s_large_preview_is_judged(says, flip, orientation, raw_file, monkeypatch):
    upright = scene(1200, 800) if orientation < 5 else scene(800, 1200)
    kept = upright if orientation == 1 else upright.transpose(TURNS[orientation])
    exif = Image.Exif()
    if says:
        exif[ExifTags.Base.Orientation] = orientation
    monkeypatch.setattr(photo_files, "rawpy", reader := Raw(kept, flip, exif.tobytes()))
    photo = assert_reads_as(raw_file, upright)
    assert reader.preview is kept
    assert (photo.width, photo.height) == ((3000, 2000) if orientation < 5 else (2000, 3000))


@pytest.mark.parametrize("preview", [None, scene(160, 120), scene(1023, 700)], ids=["none", "tiny", "small"])
def test_a_raw_file_without_a_large_preview_is_developed(preview, raw_file, monkeypatch):
    monkeypatch.setattr(photo_files, "rawpy", Raw(preview, 6))
    photo = photo_files.read_photo(raw_file)
    assert (photo.image.size, photo.width, photo.height) == ((1000, 1500), 2000, 3000)
    assert photo.image.getpixel((900, 100)) == (255 - 90, 255 - 140, 255 - 200)


def test_without_a_raw_reader_no_preview_is_judged(raw_file, tmp_path, monkeypatch):
    monkeypatch.setattr(photo_files, "rawpy", None)
    renamed = tmp_path / "renamed.tif"
    renamed.write_bytes(raw_file.read_bytes())
    for file in (raw_file, renamed):
        failure = photo_files.read_photo(file)
        assert isinstance(failure, photo_files.Failure) and "pip install rawpy" in failure.reason
    monkeypatch.setattr(photo_files, "rawpy", Raw(scene(1200, 800), 0))
    for file in (raw_file, renamed):
        assert_reads_as(file, scene(1200, 800))


@pytest.mark.parametrize("border", [(0, 100, 0, 100), (100, 0, 100, 0), (16, 150, 16, 50), (0, 90, 0, 0)])
def test_black_borders_are_cut_away(border, tmp_path):
    ImageOps.expand(scene(600, 400), border, "black").save(tmp_path / "bars.jpg", quality=80)
    photo = photo_files.read_photo(tmp_path / "bars.jpg")
    assert photo.note == "black borders cut away before judging"
    assert np.abs(np.subtract(photo.image.size, (600, 400))).max() <= 2
    assert (photo.width, photo.height) == (600 + border[0] + border[2], 400 + border[1] + border[3])


def test_the_night_is_no_border(tmp_path):
    lamp, black = Image.new("RGB", (300, 200)), Image.new("RGB", (300, 200))
    ImageDraw.Draw(lamp).ellipse((120, 60, 180, 120), "white")
    half = Image.new("RGB", (300, 200), "black")  # more black than picture: what it is nobody can tell
    half.paste("white", (0, 0, 300, 60))
    for image in (lamp, black, half):
        image.save(tmp_path / "night.png")
        photo = photo_files.read_photo(tmp_path / "night.png")
        assert photo.image.size == (300, 200) and photo.note is None


def test_what_changes_while_it_is_read_is_not_judged(tmp_path, monkeypatch):
    read = photo_files.read_photograph

    def slow(image, side):
        with open(tmp_path / "growing.png", "ab") as file:
            file.write(b"more")
        return read(image, side)

    monkeypatch.setattr(photo_files, "read_photograph", slow)
    scene().save(tmp_path / "growing.png")
    assert "changed while it was read" in photo_files.read_photo(tmp_path / "growing.png").reason


@pytest.mark.parametrize(("name", "why"), [("anim.gif", "GIF (not read: save as PNG)"), ("a.mov", "no photograph")])
def test_what_is_of_another_kind_says_why_it_is_not_read(tmp_path, name, why):
    (tmp_path / name).write_bytes(b"GIF89a")
    assert why in photo_files.read_photo(tmp_path / name).reason


def test_nothing_waits_at_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert photo_files.read_photo(tmp_path / "pipe.jpg").reason == "not a file"


# Finding -------------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_files, "SUFFIXES", {".jpg", ".tif"})  # as without the optional readers
    folder = tmp_path / "album"
    names = ["a.JPG", "b.tif", "1.HEIC", "2.heic", "3.NEF", "4.cr3", "5.dng", "6.gif", "7.GIF", "8.mov", "9.xmp"]
    names += ["a.jpg.xmp", "B.xmp", "b.tif.pp3"]  # beside their photographs
    names += ["notes.txt", "Thumbs.db", ".hidden.jpg"]
    names += ["@eaDir/t.jpg", "#recycle/t.jpg", ".thumbnails/t.jpg", ".git/t.jpg", "x.lrdata/t.jpg", "deep/er/c.jpg"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    found = photo_files.find_photos([folder])
    assert [file.relative_to(folder).as_posix() for file in found.files] == ["a.JPG", "b.tif", "deep/er/c.jpg"]
    assert {kind.split(" (")[0]: count for kind, count in found.left_out.items()} == {
        "HEIC": 2,
        "camera raw": 3,
        "GIF": 2,
        "video": 1,
        "sidecar without its photograph": 1,
        "other file": 2,
        "hidden file": 1,
        "hidden folder": 1,
        "@eaDir folder": 1,
        "#recycle folder": 1,
        ".thumbnails folder": 1,
        "folder of Lightroom's previews": 1,
        "linked folder": 1,
    }
    assert any(str(folder / "linked") in kind for kind in found.left_out)


def test_a_photograph_is_found_once(tmp_path):
    scene().save(tmp_path / "photo.jpg")
    (tmp_path / "link.jpg").symlink_to("photo.jpg")
    found = photo_files.find_photos([tmp_path, tmp_path / "photo.jpg", tmp_path / "." / "link.jpg"])
    assert found.files == [tmp_path / "link.jpg"]
