"""The library's file: what is known survives, what is not this program's is left alone."""

import contextlib
import os
import sqlite3
from pathlib import Path

import photo_library
import pytest
from library_file import NEWEST, reading
from photo_files import Failure, Judged, Photo, Stamp
from photo_library import Library, LibraryError, written_beside
from PIL import Image


def photo(path: Path, content: str = "one") -> Photo:
    path.write_text(content)
    status = path.stat()
    image = Image.new("RGB", (20, 20))
    return Photo(path, image, 20, 20, Stamp(status.st_size, status.st_mtime_ns, content), "2024-05-06T07:08:09")


def result(content: str = "one", caption: str = "The light's \"soft\", isn't it?", **more) -> dict:
    row = {
        "sha256": content,
        "caption": caption,
        "score": 6.5,
        "std": 1.5,
        "aspects": '{"blurred": 0.75}',
        "phash": "0" * 16,
    }
    return {**row, "width": 20, "height": 20, "overlay": "o.jpg", "thumbnail": "t.jpg", **more}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def found(out: Path, words: str) -> int:
    with contextlib.closing(sqlite3.connect(out / photo_library.NAME)) as database:
        return database.execute("SELECT count(*) FROM words WHERE words MATCH ?", (words,)).fetchone()[0]


# What is known -------------------------------------------------------------------------------------------------------


def test_results_belong_to_contents_and_runs(out, tmp_path):
    with Library(out, "") as library:
        assert library.begin_run("a", {"seed": 1}) == 1
        library.add([photo(tmp_path / "x.jpg")], [result()])
        assert library.judged() == {"one"} and library.is_unchanged(tmp_path / "x.jpg")
        (tmp_path / "x.jpg").rename(tmp_path / "y.jpg")
        assert not library.is_unchanged(tmp_path / "y.jpg") and not library.is_unchanged(tmp_path / "x.jpg")
        status = (tmp_path / "y.jpg").stat()
        library.add([Judged(tmp_path / "y.jpg", Stamp(status.st_size, status.st_mtime_ns, "one"))])
        assert library.is_unchanged(tmp_path / "y.jpg")
        rows = {Path(row["path"]).name: row["taken_at"] for row in library.results()}
        assert rows == {"x.jpg": "2024-05-06T07:08:09", "y.jpg": "2024-05-06T07:08:09"}
        assert library.forget_missing([tmp_path], [tmp_path / "y.jpg"]) == 1
        assert [Path(row["path"]).name for row in library.results()] == ["y.jpg"]
    with Library(out, "") as library:
        assert library.begin_run("a", {"seed": 2}) == 2 and library.judged() == set()
        assert [row["run"] for row in library.results()] == [1]  # until this one has said something
        library.add([], [result(caption="Another run.")])
        assert [(row["run"], row["caption"]) for row in library.results()] == [(2, "Another run.")]
        assert library.begin_run("a", {"seed": 1}) == 1
        assert [row["run"] for row in library.results()] == [1]
        assert library.begin_run("a", {"seed": 1}, fresh=True) == 3
        assert library.begin_run("a", {"seed": 1}) == 3  # goes on with what was begun afresh
    assert found(out, "light") == 1 and found(out, "another OR soft") == 2


def test_what_failed_is_told_until_it_works(out, tmp_path):
    with Library(out, "") as library:
        library.begin_run("a", {})
        library.add(
            [Failure(tmp_path / "x.jpg", "damaged"), photo(tmp_path / "y.jpg")], [{"sha256": "one", "error": "no"}]
        )
        assert [(one.path.name, one.reason) for one in library.failures()] == [("x.jpg", "damaged"), ("y.jpg", "no")]
        assert library.judged() == set() and list(library.results()) == []
        library.add([photo(tmp_path / "x.jpg", "two"), photo(tmp_path / "y.jpg")], [result(), result("two")])
        assert list(library.failures()) == [] and len(list(library.results())) == 2


def test_a_folder_that_cannot_be_read_just_now_is_not_forgotten(out, tmp_path, monkeypatch):
    with Library(out, "") as library:
        library.begin_run("a", {})
        (tmp_path / "box").mkdir()
        library.add([photo(tmp_path / "box" / "x.jpg")], [result()])
        (tmp_path / "box" / "x.jpg").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "lstat", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
            assert library.forget_missing([tmp_path], []) == 0
        assert library.forget_missing([tmp_path / "other"], []) == 0  # nor what this command does not ask for
        assert library.forget_missing([tmp_path], []) == 1


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text_are_kept(out, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    with Library(out, "") as library:
        library.begin_run("a", {})
        library.add([photo(path)], [result()])
        assert library.is_unchanged(path) and [row["path"] for row in library.results()] == [str(path)]
        assert library.forget_missing([tmp_path], [path]) == 0


def test_a_batch_is_written_whole_or_not_at_all(out, tmp_path):
    with Library(out, "") as library:
        library.begin_run("a", {})
        with pytest.raises(sqlite3.Error):
            library.add([photo(tmp_path / "x.jpg")], [result(), result("two", no_such_column=1)])
        assert list(library.results()) == [] and not library.is_unchanged(tmp_path / "x.jpg")
        library.add([photo(tmp_path / "x.jpg")], [result()])
        assert len(list(library.results())) == 1


def test_large_files_are_hashed_once(out, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("weights")
    (tmp_path / "b").write_text("more")
    with Library(out, "") as library:
        first = library.hash_of_files([tmp_path / "b", tmp_path / "a"])
        with monkeypatch.context() as patch:
            patch.setattr(photo_library, "hash_of", lambda path: pytest.fail("read again"))
            assert library.hash_of_files([tmp_path / "a", tmp_path / "b"]) == first
        (tmp_path / "a").write_text("weighed")
        os.utime(tmp_path / "a", ns=(0, 1))
        assert library.hash_of_files([tmp_path / "a", tmp_path / "b"]) != first


# What is not this program's ------------------------------------------------------------------------------------------


def test_one_run_at_a_time(out):
    message = rf"process {os.getpid()} on .*: caption_photos.py ~/Pictures"
    with Library(out, "caption_photos.py ~/Pictures"), pytest.raises(LibraryError, match=message):
        Library(out, "another")
    with Library(out, "another"):
        pass


@pytest.mark.parametrize("name", ["captions.jsonl", "failed.jsonl", "gallery.html", "overlays", "gallery"])
def test_a_folder_with_such_names_from_elsewhere_is_refused(name, out):
    out.mkdir()
    (out / name).write_text("mine") if "." in name else (out / name).mkdir()
    with pytest.raises(LibraryError, match=f"holds {name}"):
        Library(out, "")
    assert name not in ("captions.jsonl",) or (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", [photo_library.NAME, photo_library.LOCK, "overlays", "gallery"])
def test_no_link_is_written_through(name, out, tmp_path):
    with Library(out, ""):
        pass
    target = tmp_path / "photograph.jpg"
    if (out / name).is_dir():
        (out / name).rename(target)
    else:
        (out / name).unlink()
        target.write_text("precious")
    (out / name).symlink_to(target)
    with pytest.raises(LibraryError, match="is a link"):
        Library(out, "")
    assert target.is_dir() or target.read_text() == "precious"


def test_another_program_s_file_is_refused(out):
    out.mkdir()
    with contextlib.closing(sqlite3.connect(out / photo_library.NAME)) as database:
        database.execute("CREATE TABLE books (title)")
    with pytest.raises(LibraryError, match="another program's"):
        Library(out, "")
    (out / photo_library.NAME).write_text("no database at all, " * 100)
    with pytest.raises(LibraryError, match="not a database"):
        Library(out, "")
    assert (out / photo_library.NAME).read_text() == "no database at all, " * 100


def test_a_newer_library_is_refused(out):
    with Library(out, "") as library:
        library.database.execute("PRAGMA user_version = 99")
    with pytest.raises(LibraryError, match="of form 99, this program knows 2"):
        Library(out, "")


def test_a_library_of_the_first_form_keeps_its_captions(out, tmp_path):
    with Library(out, "") as library:
        library.begin_run("a", {})
        library.add([photo(tmp_path / "x.jpg")], [result(phash=None)])
        library.database.executescript(
            "ALTER TABLE result DROP COLUMN embedding; ALTER TABLE result DROP COLUMN phash; PRAGMA user_version = 1"
        )
    with pytest.raises(LibraryError, match=r"of form 1, .* caption_photos.py into it once more"), reading(out):
        pass
    with Library(out, "") as library:
        library.begin_run("a", {})
        assert library.without_features() == {"one"} and library.judged() == set()
        assert not library.is_unchanged(tmp_path / "x.jpg")
        library.add([], features=[{"sha256": "one", "embedding": b"12", "phash": "f" * 16}])
        assert library.without_features() == set() and library.judged() == {"one"}
        row = next(library.results())
        assert row["caption"] == result()["caption"] and row["phash"] == "f" * 16
        assert library.database.execute("SELECT embedding FROM result").fetchone()[0] == b"12"
    assert found(out, "light") == 1


def test_others_read_while_a_run_is_at_work(out, tmp_path):
    with Library(out, "") as library:
        library.begin_run("a", {})
        library.add([photo(tmp_path / "x.jpg")], [result()])
        for place in (out, out / "library.sqlite"):
            with reading(place) as database:
                assert [row["score"] for row in database.execute(NEWEST, {"run": 0})] == [6.5]
                with pytest.raises(sqlite3.OperationalError, match="readonly"):
                    database.execute("DELETE FROM result")


@pytest.mark.parametrize("content", [None, "no database at all", ""])
def test_what_is_no_library_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "library.sqlite").write_text(content)
    with pytest.raises(LibraryError, match=r"library\.sqlite"), reading(tmp_path):
        pass


def test_what_somebody_else_changed_is_moved_aside(out):
    with Library(out, "") as library:
        assert library.publish("captions.jsonl", lambda file: file.write("first")) is None
        assert library.publish("captions.jsonl", lambda file: file.write("second")) is None
        for number in (1, 2):
            (out / "captions.jsonl").write_text("corrected by hand")
            aside = library.publish("captions.jsonl", lambda file: file.write("third"))
            assert aside == out / f"captions.kept-{number}.jsonl" and aside.read_text() == "corrected by hand"
        assert (out / "captions.jsonl").read_text() == "third"


def test_an_export_replaces_a_link_and_not_its_target(out, tmp_path):
    (tmp_path / "photograph.jpg").write_text("precious")
    with Library(out, "") as library:
        library.publish("captions.jsonl", lambda file: file.write("first"))
        (out / "captions.jsonl").unlink()
        (out / "captions.jsonl").symlink_to(tmp_path / "photograph.jpg")
        (out / ".captions.jsonl.part").symlink_to(tmp_path / "photograph.jpg")
        library.publish("captions.jsonl", lambda file: file.write("second"))
    assert (tmp_path / "photograph.jpg").read_text() == "precious"
    assert not (out / "captions.jsonl").is_symlink() and (out / "captions.jsonl").read_text() == "second"


def test_an_error_leaves_a_file_as_it_was(tmp_path):
    (tmp_path / "page.html").write_text("first")
    with pytest.raises(OSError), written_beside(tmp_path / "page.html") as beside:
        beside.write_text("sec")
        raise OSError("disk full")
    assert (tmp_path / "page.html").read_text() == "first" and os.listdir(tmp_path) == ["page.html"]
