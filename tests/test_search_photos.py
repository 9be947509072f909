"""Searching a library: what is typed never breaks it, and what is found is what was asked for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import search_photos
from photo_files import Judged, Stamp, hash_of
from photo_library import Library
from search_photos import full_text_terms


WEIGHTS = {"weights": "w", "reader": 1}
# Of each photograph the caption, score, share of underexposed and of blurred, direction of its features in degrees
PHOTOS = {
    "beach.jpg": ("Soft light, and the sky isn't too bright.", 8.0, 0.1, 0.1, 0),
    "dunes.jpg": ("The light is soft.", 7.0, 0.6, 0.2, 20),
    "night.jpg": ("Too dark: harsh shadows.", 4.0, 0.9, 0.6, 170),
    'o\'Hara "b".jpg': ("Café light in the shadow; 50% grey.", 5.0, 0.7, 0.4, 90),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        (folder / name).write_text(name)
    return folder


def result(sha256: str, caption: str, score: float, dark: float, blurred: float, degrees: float | None) -> dict:
    aspects = json.dumps({"underexposed": dark, "low_contrast": 0.0, "blurred": blurred})
    turned = None if degrees is None else np.radians(degrees)
    # what they all have in common is more than what tells them apart
    features = None if degrees is None else np.array([np.cos(turned), np.sin(turned), 3]).astype("<f2").tobytes()
    row = {
        "sha256": sha256,
        "caption": caption,
        "score": score,
        "std": 1.0,
        "aspects": aspects,
        "width": 1,
        "height": 1,
    }
    return {**row, "overlay": "o", "thumbnail": "t", "phash": "0" * 16, "embedding": features}


@pytest.fixture(scope="module")
def library(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    with Library(out, "") as opened:
        opened.begin_run("m", WEIGHTS)
        files = [Judged(photos / name, Stamp(1, 1, hash_of(photos / name))) for name in PHOTOS]
        opened.add(files, [result(file.stamp.sha256, *PHOTOS[file.path.name]) for file in files])
    return out


@pytest.fixture
def search(library, capsys):
    """Names of what is found, in order; or the exit status and what was said."""

    def names(*arguments: object) -> list[str] | tuple[int, str]:
        status = search_photos.main([str(library), "--paths", *map(str, arguments)])
        said = capsys.readouterr()
        return (status, said.err) if status else [os.path.basename(line) for line in said.out.splitlines()]

    return names


# Words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("soft light", ["beach.jpg", "dunes.jpg"]),  # the first in this order
        ("light soft", ["dunes.jpg", "beach.jpg"]),  # the shorter caption fits better
        ("sof* light", ["dunes.jpg", "beach.jpg"]),
        ('"soft light"', ["beach.jpg"]),
        ("light SOFT", ["dunes.jpg", "beach.jpg"]),
        ("isn't", ["beach.jpg"]),
        ("isn\u2019t", ["beach.jpg"]),
        ("cafe", ['o\'Hara "b".jpg']),
        ("shadow", ['o\'Hara "b".jpg']),
        ("shadow*", ["night.jpg", 'o\'Hara "b".jpg']),
        ("light -soft", ['o\'Hara "b".jpg']),
        ('light -"soft light" -cafe', ["dunes.jpg"]),
        ('"soft light', ["beach.jpg"]),
        ("50%", ['o\'Hara "b".jpg']),
        ("", ["beach.jpg", "dunes.jpg", 'o\'Hara "b".jpg', "night.jpg"]),
    ],
)
def test_words(words, found, search):
    assert search(words) == found


@pytest.mark.parametrize(
    "words",
    [
        'so"ft',
        '""" soft',
        "NEAR(soft light)",
        "caption:soft",
        "soft AND",
        "OR OR",
        "NOT",
        "^soft",
        "(soft",
        "soft)",
        "*soft*",
        "{a b}: c",
        "soft + light",
        "'; DROP TABLE file; --",
        "a\0b",
        "caf\udce9",
        "\u4e2d\u6587 \U0001f600",
        "x" * 10_000,
    ],
)
def test_whatever_is_typed_breaks_nothing(words, search):
    found = search(words)
    assert isinstance(found, list) or (found[0] == 1 and found[1].startswith("Nothing was found."))


@pytest.mark.parametrize("words", ['"', "*", "' '", '"*" -', "\U0001f600"])
def test_no_word_at_all(words, search):
    status, said = search(words)
    assert status == 2 and "no word to look for" in said


def test_words_without_quotes_and_after_options(library, capsys):
    assert search_photos.main([str(library), "--min-score", "7.5", "soft", "light", "--paths"]) == 0
    assert capsys.readouterr().out.endswith("beach.jpg\n")


@pytest.mark.parametrize("unwanted", ["-soft", '-"soft light"', "-harsh", "-isn't"])
def test_what_must_not_occur_is_typed_as_it_is_said(unwanted, search):
    assert search(unwanted) == search(f" {unwanted}") != search("")
    assert search(unwanted, "--limit", 9, "light") == search("light", unwanted) == search(f"light {unwanted}")


def test_words_that_no_critique_has_are_named(search):
    assert search("light", "soft", "sunset") == (1, 'Nothing was found. No critique in this library has "sunset".\n')
    assert search("soft", "dark") == (1, "Nothing was found.\n")


def test_operators_are_words():
    assert full_text_terms('a OR "b c') == (['"a"', '"OR"', '"b c"'], [])
    assert full_text_terms('sunset* -a" -"d e"') == (['"sunset*"*'], ['"a"""', '"d e"'])


# Aspects, scores, likeness ------------------------------------------------------------------------------------------


def test_aspects_and_scores(search):
    assert search("--aspect", "underexposed") == ["night.jpg", 'o\'Hara "b".jpg', "dunes.jpg"]
    assert search("--aspect", "Underexposed", "--aspect", "blurred") == ["night.jpg"]
    assert search("--aspect", "low contrast")[0] == 1
    assert search("--min-score", 5, "--max-score", 7.5) == ["dunes.jpg", 'o\'Hara "b".jpg']
    assert search("light", "--aspect", "underexposed", "--min-score", 6) == ["dunes.jpg"]
    status, said = search("--aspect", "too dark")
    assert status == 2 and said.rstrip().endswith("'too dark' is no aspect that this library's models tell. There are: "
                                                  "blurred, low_contrast, underexposed.")  # fmt: skip


def test_likeness(search, photos, tmp_path):
    order = ["dunes.jpg", 'o\'Hara "b".jpg', "night.jpg"]
    assert search("--like", photos / "beach.jpg") == order
    assert search("--like", photos / "beach.jpg", "--limit", 1) == order[:1]
    assert search("light", "--like", photos / "night.jpg")[0] == 'o\'Hara "b".jpg'
    assert sorted(search("soft", "--like", photos / "night.jpg")) == ["beach.jpg", "dunes.jpg"]
    shutil.copy(photos / "beach.jpg", tmp_path / "copy.jpg")  # known by its content
    assert search("--like", tmp_path / "copy.jpg") == ["beach.jpg", *order]
    (tmp_path / "new.jpg").write_text("never captioned")
    assert search("--like", tmp_path / "new.jpg")[0] == 2
    assert "is not in this library: run caption_photos.py" in search("--like", tmp_path / "new.jpg")[1]
    assert "is not there" in search("--like", tmp_path / "none.jpg")[1]


def test_likeness_of_what_is_on_no_drive_just_now(search, photos):
    (photos / "beach.jpg").rename(photos / "away")
    try:
        assert search("--like", photos / "beach.jpg")[0] == "dunes.jpg"
    finally:
        (photos / "away").rename(photos / "beach.jpg")


def test_features_of_other_weights_are_not_compared(photos, tmp_path, capsys):
    names = sorted(PHOTOS)
    with Library(tmp_path, "") as library:
        for settings, chosen in ((WEIGHTS, names[:2]), ({**WEIGHTS, "weights": "tuned"}, names[2:3])):
            library.begin_run("m", settings)
            files = [Judged(photos / name, Stamp(1, 1, hash_of(photos / name))) for name in chosen]
            library.add(files, [result(file.stamp.sha256, *PHOTOS[file.path.name]) for file in files])
        library.begin_run("m", {**WEIGHTS, "max_new_tokens": 5})  # says other words, sees the same
        file = Judged(photos / names[3], Stamp(1, 1, hash_of(photos / names[3])))
        library.add([file], [result(file.stamp.sha256, "", 5.0, 0, 0, 1.0)])
        (photos / "blind.jpg").write_text("its base has no image features")
        blind = hash_of(photos / "blind.jpg")
        library.add([Judged(photos / "blind.jpg", Stamp(1, 1, blind))], [result(blind, "", 5.0, 0, 0, None)])
    assert search_photos.main([str(tmp_path), "--paths", "--like", str(photos / names[0])]) == 0
    said = capsys.readouterr()
    assert {os.path.basename(line) for line in said.out.splitlines()} == {names[1], names[3]}
    assert said.err == "2 left out: of another model, or without image features.\n"
    assert search_photos.main([str(tmp_path), "--like", str(photos / "blind.jpg")]) == 2
    assert "has no image features" in capsys.readouterr().err


# What is printed -----------------------------------------------------------------------------------------------------


def test_lines(library, photos, capsys):
    assert search_photos.main([str(library / "library.sqlite"), "dark", "--like", str(photos / "beach.jpg")]) == 0
    path, line = capsys.readouterr().out.splitlines()
    assert path == str(photos / "night.jpg")
    assert line.strip().split(" · ")[1:] == ["4.0 of 10", "underexposed, blurred", "Too dark: harsh shadows."]
    assert search_photos.main([str(library), "dark", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["path"] == str(photos / "night.jpg") and record["score"] == 4.0
    assert record["aspects"]["underexposed"] == 0.9 and "likeness" not in record


def test_a_reader_that_has_enough(library):
    command = [sys.executable, "search_photos.py", str(library), "--paths"]
    pipe_in, pipe_out = os.pipe()
    os.close(pipe_in)
    done = subprocess.run(command, stdout=pipe_out, stderr=subprocess.PIPE, cwd=Path(search_photos.__file__).parent)
    os.close(pipe_out)
    assert done.returncode == 0 and done.stderr == b""


def test_a_library_that_is_not_there(tmp_path, capsys):
    assert search_photos.main([str(tmp_path / "none"), "light"]) == 2
    assert "caption_photos.py PHOTOS --out" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--min-score", "70"], ["--limit", "0"], ["--max-score", "nan"]])
def test_wrong_arguments(arguments, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        search_photos.main([str(tmp_path), *arguments])
    assert stopped.value.code == 2


def test_a_question_loads_no_model_s_libraries(library):
    """Importing torch takes longer than any search."""
    code = (
        "import sys, search_photos; search_photos.main(sys.argv[1:]); assert not {'torch', 'PIL'} & set(sys.modules)"
    )
    examples = Path(search_photos.__file__).parent
    subprocess.run([sys.executable, "-c", code, str(library), "light"], check=True, cwd=examples, capture_output=True)
