"""XMP sidecars of three programs: what is theirs stays, by exiftool's own reading; what is ours is found."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import xmp_sidecars
from PIL import Image
from xmp_sidecars import write_sidecars


pytestmark = pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")

HEAD = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
 xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" xmlns:darktable="http://darktable.sf.net/"
 xmlns:digiKam="http://www.digikam.org/ns/1.0/" xmlns:my="http://example.org/my/1.0/" """
TAIL = "</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end='w'?>"


def bag(name: str, *values: str, kind: str = "Bag") -> str:
    return f"<{name}><rdf:{kind}>{''.join(f'<rdf:li>{value}</rdf:li>' for value in values)}</rdf:{kind}></{name}>"


LIGHTROOM = (
    HEAD
    + 'crs:Exposure2012="+0.50" crs:HasSettings="True" xmp:Label="Red" my:odd="kept &amp; sound">'
    + bag("crs:ToneCurvePV2012", "0, 0", "255, 255", kind="Seq")
    + '<dc:description><rdf:Alt><rdf:li xml:lang="de">Ein Berg</rdf:li></rdf:Alt></dc:description>'
    + bag("dc:subject", "2024", "peak")
    + bag("lr:hierarchicalSubject", "year|2024", "land|peak")
    + TAIL
)
DARKTABLE = (
    HEAD
    + 'xmp:Rating="-1" darktable:xmp_version="5" darktable:history_end="2"><darktable:history><rdf:Seq>'
    + '<rdf:li darktable:num="0" darktable:operation="exposure" darktable:params="gz02eJxjYGBgkGAAgRNODESDBnsIHll8ANZq"/>'
    + "</rdf:Seq></darktable:history>"
    + bag("darktable:colorlabels", "0", "3", kind="Seq")
    + TAIL
)
DIGIKAM = (
    HEAD
    + 'xmp:Rating="4" digiKam:ColorLabel="2" digiKam:PickLabel="3">'
    + bag("digiKam:TagsList", "people/Ann", kind="Seq")
    + bag("dc:subject", "Ann")
    + '<tiff:ImageDescription><rdf:Alt><rdf:li xml:lang="x-default">Ann at home</rdf:li>'
    + '<rdf:li xml:lang="fr-FR">Ann chez elle</rdf:li></rdf:Alt></tiff:ImageDescription>'
    + TAIL
)


def row(photo: Path, **more) -> dict:
    caption = 'Soft light,\nand "more" & <b>; café.'
    return {"path": str(photo), "caption": caption, "score": 7.4, "aspects": {"too_dark": 0.9, "blurred": 0.1}, **more}


CAPTION = 'Soft light, and "more" & <b>; café.'


def said(sidecar: Path) -> dict:
    command = ["exiftool", "-json", "-G1", "-struct", "-XMP:all", str(sidecar)]
    (fields,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {name: value for name, value in fields.items() if name != "SourceFile" and not name.endswith("XMPToolkit")}


@pytest.fixture
def photo(tmp_path) -> Path:
    (tmp_path / "photo.jpg").write_text("left alone")
    return tmp_path / "photo.jpg"


def test_a_new_sidecar_says_all(photo):
    done = write_sidecars([row(photo)])
    assert (done.written, done.unchanged, done.problems) == (1, 0, [])
    assert said(photo.with_name("photo.jpg.xmp")) == {
        "XMP-dc:Description": CAPTION,
        "XMP-tiff:ImageDescription": CAPTION,
        "XMP-xmp:Rating": 4,
        "XMP-dc:Subject": ["too dark"],
        "XMP-digiKam:TagsList": ["Critique/too dark"],
        "XMP-lr:HierarchicalSubject": ["Critique|too dark"],
    }
    assert photo.read_text() == "left alone" and sorted(os.listdir(photo.parent)) == ["photo.jpg", "photo.jpg.xmp"]


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (
            LIGHTROOM,
            {
                "XMP-dc:Description": CAPTION,
                "XMP-tiff:ImageDescription": CAPTION,
                "XMP-xmp:Rating": 4,
                "XMP-dc:Subject": [2024, "peak", "too dark"],
                "XMP-digiKam:TagsList": ["year/2024", "land/peak", "Critique/too dark"],
                "XMP-lr:HierarchicalSubject": ["year|2024", "land|peak", "Critique|too dark"],
            },
        ),
        (
            DARKTABLE,  # its rating is "rejected"
            {
                "XMP-dc:Description": CAPTION,
                "XMP-tiff:ImageDescription": CAPTION,
                "XMP-dc:Subject": ["too dark"],
                "XMP-digiKam:TagsList": ["Critique/too dark"],
                "XMP-lr:HierarchicalSubject": ["Critique|too dark"],
            },
        ),
        (
            DIGIKAM,
            {
                "XMP-dc:Subject": ["Ann", "too dark"],
                "XMP-digiKam:TagsList": ["people/Ann", "Critique/too dark"],
                "XMP-lr:HierarchicalSubject": ["people|Ann", "Critique|too dark"],
            },
        ),
    ],
    ids=["lightroom", "darktable", "digikam"],
)
@pytest.mark.parametrize("name", ["photo.xmp", "photo.jpg.xmp", "Photo.JPG.XMP"])
def test_what_is_theirs_stays(name, theirs, ours, photo):
    sidecar = photo.with_name(name)
    sidecar.write_text(theirs, encoding="utf-8")
    before = said(sidecar)
    assert write_sidecars([row(photo)], form="photo.jpg.xmp").written == 1
    after = said(sidecar)
    assert after == {**before, **ours}
    content = sidecar.read_bytes()
    done = write_sidecars([row(photo)])
    assert (done.written, done.unchanged) == (0, 1) and sidecar.read_bytes() == content
    assert sorted(os.listdir(photo.parent)) == sorted(["photo.jpg", name])


@pytest.mark.parametrize("theirs", [LIGHTROOM, DARKTABLE, DIGIKAM], ids=["lightroom", "darktable", "digikam"])
def test_what_a_photograph_says_itself_is_in_its_first_sidecar(theirs, tmp_path):
    """Programs that find a sidecar do not look into the photograph: its stars and words would be gone."""
    photo, beside = tmp_path / "photo.jpg", tmp_path / "other.xmp"
    packet = theirs.encode()
    Image.new("RGB", (40, 30), "gray").save(photo, xmp=packet)
    beside.write_text(theirs, encoding="utf-8")
    content, before = photo.read_bytes(), said(photo)
    assert before == said(beside)
    assert write_sidecars([row(photo)]).written == 1
    after = said(photo.with_name("photo.jpg.xmp"))
    shutil.copy(beside, tmp_path / "alone.jpg.xmp")
    assert write_sidecars([row(tmp_path / "alone.jpg")]).written == 1
    assert after == said(tmp_path / "alone.jpg.xmp") and all(name in after for name in before)
    assert photo.read_bytes() == content
    done = write_sidecars([row(photo)])
    assert (done.written, done.unchanged, done.problems) == (0, 1, [])


def test_overwriting_is_asked_for(photo):
    sidecar = photo.with_name("photo.xmp")
    sidecar.write_text(DIGIKAM, encoding="utf-8")
    write_sidecars([row(photo)])
    assert said(sidecar)["XMP-xmp:Rating"] == 4 and said(sidecar)["XMP-tiff:ImageDescription"] == "Ann at home"
    better = row(photo, caption="Clear.", score=9.6, aspects={"blurred": 0.9})
    write_sidecars([better])
    assert said(sidecar)["XMP-xmp:Rating"] == 4 and "too dark" in said(sidecar)["XMP-dc:Subject"]
    write_sidecars([better], overwrite=True)
    fields = said(sidecar)
    assert fields["XMP-xmp:Rating"] == 5
    assert fields["XMP-dc:Description"] == fields["XMP-tiff:ImageDescription"] == "Clear."
    assert fields["XMP-dc:Subject"] == ["Ann", "blurred"]
    assert fields["XMP-digiKam:TagsList"] == ["people/Ann", "Critique/blurred"]
    assert fields["XMP-digiKam:ColorLabel"] == 2 and fields["XMP-tiff:ImageDescription-fr-FR"] == "Ann chez elle"


@pytest.mark.parametrize("score, stars", [(1.0, 1), (1.2, 1), (2.9, 2), (4.6, 3), (10.0, 5)])
def test_ratings_are_whole_stars(score, stars, photo):
    write_sidecars([row(photo, score=score)], form="photo.xmp")
    assert said(photo.with_name("photo.xmp"))["XMP-xmp:Rating"] == stars


@pytest.mark.parametrize(
    "content, reason",
    [
        (LIGHTROOM.encode()[:700], "cut short"),
        (LIGHTROOM.encode("utf-16"), "not UTF-8"),
        (LIGHTROOM.replace("Berg", "Höhe").encode("latin-1", "replace"), "not UTF-8"),
        (b"", "cut short"),
        (b"<html></html>", "no XMP"),
    ],
    ids=["cut", "utf16", "latin1", "empty", "html"],
)
def test_what_could_be_spoiled_is_left_as_it_is(content, reason, photo):
    sidecar, other = photo.with_name("photo.xmp"), photo.with_name("other.jpg")
    sidecar.write_bytes(content)
    done = write_sidecars([row(photo), row(other)])
    assert done.written == 1 and other.with_name("other.jpg.xmp").exists()
    (problem,) = done.problems
    assert problem.path == photo and reason in problem.reason
    assert sidecar.read_bytes() == content and not photo.with_name("photo.jpg.xmp").exists()


def test_links_and_shared_sidecars_are_not_written(photo, tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text(LIGHTROOM, encoding="utf-8")
    photo.with_name("photo.jpg.xmp").symlink_to(precious)
    (tmp_path / "pair.xmp").write_text(DARKTABLE, encoding="utf-8")
    done = write_sidecars([row(photo), row(tmp_path / "pair.dng"), row(tmp_path / "pair.jpg")])
    assert done.written == 1 and precious.read_text(encoding="utf-8") == LIGHTROOM
    assert [problem.path.name for problem in done.problems] == ["photo.jpg", "pair.jpg"]
    assert "is a link" in done.problems[0].reason and "is pair.dng's too" in done.problems[1].reason


def test_a_folder_that_takes_no_files_is_a_problem(photo, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    (problem,) = write_sidecars([row(photo)]).problems
    assert "Permission denied" in problem.reason and os.listdir(photo.parent) == ["photo.jpg"]


def test_many_sidecars_with_odd_names(tmp_path, monkeypatch):
    monkeypatch.setattr(xmp_sidecars, "TOGETHER", 2)
    photos = [tmp_path / name for name in ("#1 100%d.jpg", "-x.jpg", "été (2).jpg", "a\nb.jpg", "日本.jpg")]
    done = write_sidecars([row(photo) for photo in photos])
    assert done.written == 4 and [problem.path for problem in done.problems] == [photos[3]]
    for photo in photos:
        assert photo == photos[3] or said(photo.with_name(f"{photo.name}.xmp"))["XMP-xmp:Rating"] == 4
