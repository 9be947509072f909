"""Suggested edits: what the judge likes better is found, what is good is left alone, nothing is overwritten."""

import json
from pathlib import Path

import caption_photos
import numpy as np
import pytest
import suggest_edits
import torch
from conftest import landscape, tiny_model, tiny_processor
from picture_edits import CORRECTIONS, contrast, corrected, cut, expose, is_featureless, salient_crop, turn, warm
from PIL import ExifTags, Image


SCENE = landscape(np.random.default_rng(0))
MIDDLE = np.asarray(SCENE, np.float32).mean((0, 1))


def distance(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).mean())


class Taste:
    """Stands for a model: likes the light and colour of `SCENE`, and looks at the left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.loads, self.seen, self.caption, self.aspects = 0, [], "", {}
        monkeypatch.setattr(suggest_edits, "start_model", self.start)
        monkeypatch.setattr(suggest_edits, "critique", self.critique)

    def start(self, args) -> tuple[None, None]:
        self.loads += 1
        return None, None

    def critique(self, model, processor, images, sizes, max_new_tokens):
        self.seen += images
        for image, (height, width) in zip(images, sizes, strict=True):
            off = np.abs(np.asarray(image, np.float32).mean((0, 1)) - MIDDLE).mean()
            heat = torch.zeros(height, width)
            heat[:, : width // 5] = 1
            said = {"caption": self.caption if max_new_tokens > 1 else "", "aspects": self.aspects}
            yield {**said, "score": {"mean": float(9 - off / 10)}, "heat": heat}


@pytest.fixture
def taste(monkeypatch) -> Taste:
    return Taste(monkeypatch)


@pytest.fixture
def run(tmp_path, capsys):
    def suggest(*arguments: object) -> tuple[int, str, str]:
        status = suggest_edits.main([str(tmp_path / "photos"), "--out", str(tmp_path / "out"), *map(str, arguments)])
        return status, *capsys.readouterr()

    (tmp_path / "photos").mkdir()
    return suggest


def records(out: Path) -> dict[str, dict]:
    return {path.name.rpartition("-")[0]: json.loads(path.read_text()) for path in out.glob("*.json")}


# Corrections ---------------------------------------------------------------------------------------------------------


def test_each_correction_takes_its_opposite_back():
    muted = contrast(SCENE, 0.6)
    for correct, there, back in ((expose, -1, 1), (warm, 0.3, -0.3), (contrast, 0.6, 1 / 0.6)):
        faulted = correct(muted, there)
        assert distance(faulted, muted) > 8
        assert distance(correct(faulted, back), muted) < 1.5
    for kind, (correct, _) in CORRECTIONS.items():
        assert distance(correct(SCENE, 1.0 if kind == "contrast" else 0.0), SCENE) < 0.01


def test_one_stop_is_twice_the_light():
    grey = Image.new("RGB", (4, 4), (99, 99, 99))
    linear = [(((code / 255) + 0.055) / 1.055) ** 2.4 for code in (99, expose(grey, 1).getpixel((0, 0))[0])]
    assert linear[1] / linear[0] == pytest.approx(2, abs=0.03)
    red, green, blue = warm(grey, 0.3).getpixel((0, 0))
    assert red > green == 99 > blue


@pytest.mark.parametrize("size", [(480, 360), (300, 500), (400, 400)])
@pytest.mark.parametrize("degrees", [-5.0, 1.0, 5.0])
def test_a_turn_has_no_empty_corners(size, degrees):
    turned = turn(Image.new("RGB", size, "white"), degrees)
    assert np.asarray(turned)[2:-2, 2:-2].min() == 255
    assert turned.width / turned.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert turned.width > 0.8 * size[0]


def test_faults_are_mended_and_good_photographs_stay(taste, run, tmp_path):
    faults = {"dark": expose(SCENE, -1.5), "cool": warm(SCENE, -0.45), "good": SCENE, "nearly": expose(SCENE, -0.05)}
    for name, image in faults.items():
        image.save(tmp_path / "photos" / f"{name}.png")
    before = {path: path.read_bytes() for path in (tmp_path / "photos").iterdir()}
    status, said, errors = run()
    assert status == 0 and errors == "" and taste.loads == 1
    assert "4 looked at: 2 corrections" in said
    found = records(tmp_path / "out")
    assert found["dark"]["steps"][0] == ["exposure_ev", 1.5] and found["cool"]["steps"] == [["warmth_ev", 0.45]]
    assert found["good"]["steps"] == found["nearly"]["steps"] == []
    for name, record in found.items():
        assert all(one["score"] <= record["corrected_score"] + 0.5 for one in record["tried"])
        assert {one["step"][0] for one in record["tried"] if not one["after"]} == set(CORRECTIONS) - {
            suggest_edits.ASKED
        }
        files = [file for file in record["files"] if "crop" not in file]
        assert len(files) == (2 if record["steps"] else 0)
        if record["steps"]:
            copy = Image.open(tmp_path / "out" / files[0])
            assert distance(copy, SCENE) < distance(faults[name], SCENE) / 2
    assert {path: path.read_bytes() for path in (tmp_path / "photos").iterdir()} == before


@pytest.mark.parametrize(
    ("kind", "strength", "edit", "caption", "aspects"),
    [
        ("exposure_ev", 1.5, "exposure +1.5 EV", "Much too bright.", {"overexposed": 0.9}),
        ("exposure_ev", -1.5, "exposure -1.5 EV", "Severely underexposed.", {"too_dark": 0.9}),
        ("warmth_ev", 0.45, "warmer by 0.45 EV", "It has an orange cast.", {"warm_cast": 0.5}),
        ("warmth_ev", -0.45, "cooler by 0.45 EV", "It has a bluish cast.", {"cool_cast": 0.5}),
    ],
)
def test_no_edit_adds_to_a_fault_that_the_model_names(taste, run, tmp_path, kind, strength, edit, caption, aspects):
    corrected(SCENE, kind, -strength).save(tmp_path / "photos" / "a.png")
    assert edit in run("--out", tmp_path / "nothing is named")[1]
    for taste.caption, taste.aspects in ((caption, {}), ("", aspects)):
        out = tmp_path / f"named {taste.caption}"
        assert edit not in run("--out", out)[1]
        tried = [one["step"][1] for one in records(out)["a"]["tried"] if one["step"][0] == kind]
        assert tried and all(one * strength < 0 for one in tried)
    taste.aspects = dict.fromkeys(aspects, 0.4)
    assert edit in run("--out", tmp_path / "not certain")[1]


def test_contrast_goes_no_further_the_wrong_way():
    def strengths(caption: str) -> set[float]:
        edits = suggest_edits.possible_edits({"caption": caption, "aspects": {}}, straighten=False)
        return {strength for kind, strength in edits if kind == "contrast"}

    assert min(strengths("The tones are flat.")) > 1 and max(strengths("The contrast is harsh.")) < 1
    assert strengths("Flat light, harsh shadows.") == set()


def test_edits_are_said_as_people_say_them():
    said = [suggest_edits.in_words(*edit) for edit in (("exposure_ev", 1.5), ("warmth_ev", -0.45), ("contrast", 1.2))]
    assert said == ["exposure +1.5 EV", "cooler by 0.45 EV", "contrast +20 %"]
    turns = [suggest_edits.in_words("straighten_degrees", degrees) for degrees in (1.0, -5.0)]
    assert turns == ["straighten by 1 degree to the left", "straighten by 5 degrees to the right"]


def test_the_margin_decides(taste, run, tmp_path):
    expose(SCENE, -0.5).save(tmp_path / "photos" / "a.png")
    assert "1 corrections" in run()[1]
    assert "0 corrections" in run("--margin", 5, "--out", tmp_path / "strict")[1]


def test_straightening_only_if_asked(taste, run, tmp_path):
    SCENE.save(tmp_path / "photos" / "a.png")
    run()
    run("--straighten", "--out", tmp_path / "straight")
    kinds = [
        {one["step"][0] for one in records(out)["a"]["tried"]} for out in (tmp_path / "out", tmp_path / "straight")
    ]
    assert kinds[1] - kinds[0] == {"straighten_degrees"}


def test_copies_are_full_size_upright_and_without_exif(taste, run, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    dark = expose(SCENE, -1.5).resize((3000, 2250)).transpose(Image.Transpose.ROTATE_90)
    dark.save(tmp_path / "photos" / "a.jpg", exif=exif)
    run()
    record = records(tmp_path / "out")["a"]
    copy = Image.open(tmp_path / "out" / record["files"][0])
    assert copy.size == (3000, 2250) and not copy.getexif()
    both = Image.open(tmp_path / "out" / record["files"][1])
    assert both.size == (2020, 750)
    halves = [np.asarray(both)[:, :1000].mean(), np.asarray(both)[:, 1020:].mean()]
    assert halves[0] < halves[1] - 30
    assert max(max(image.size) for image in taste.seen) <= suggest_edits.JUDGED_SIDE


# Crops ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 4 / 5, 16 / 9])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 200)])
def test_a_crop_is_the_best_of_all(shape, ratio):
    heat = np.random.default_rng(0).random(shape) ** 8
    crop = salient_crop(heat, ratio)
    height, width = shape
    if width / height > ratio:
        side = round(height * ratio)
        shares = [heat[:, start : start + side].sum() / heat.sum() for start in range(width - side + 1)]
    else:
        side = round(width / ratio)
        shares = [heat[start : start + side].sum() / heat.sum() for start in range(height - side + 1)]
    assert crop.inside == pytest.approx(max(shares)) and crop.centred == pytest.approx(shares[(len(shares) - 1) // 2])
    left, top, right, bottom = crop.box
    assert (right - left) * width / ((bottom - top) * height) == pytest.approx(ratio, rel=0.03)
    assert cut(Image.new("L", (10 * width, 10 * height)), crop.box).width == pytest.approx((right - left) * width * 10)


def test_crops_that_need_no_choice():
    assert salient_crop(np.ones((90, 160)), 16 / 9) is None
    for heat in (np.ones((60, 100)), np.zeros((60, 100))):
        crop = salient_crop(heat, 1)
        assert crop.box == (0.2, 0, 0.8, 1) and crop.inside == crop.centred


def test_crops_follow_the_subject(taste, run, tmp_path):
    SCENE.save(tmp_path / "photos" / "a.png")
    said = run()[1]
    crops = records(tmp_path / "out")["a"]["crops"]
    assert [name for name, crop in crops.items() if crop["suggested"]] == ["1:1", "4:5"]  # the third is as wide
    assert "crops 1:1, 4:5" in said and "2 crops suggested" in said
    name = next(name for name in records(tmp_path / "out")["a"]["files"] if "crop-1x1" in name)
    picture = Image.open(tmp_path / "out" / name)
    assert picture.size == (360, 360) and distance(picture, SCENE.crop((0, 0, 360, 360))) < 8


def test_nothing_is_suggested_for_a_featureless_frame(taste, run, tmp_path):
    rng, down = np.random.default_rng(0), np.linspace(0, 40, 300)[:, None, None]
    frames = {"cap": rng.normal(2, 2, (300, 400, 3)), "wall": rng.normal(128, 10, (300, 400, 3)) + down}
    for name, pixels in frames.items():
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    assert "2 looked at: 0 corrections and 0 crops suggested" in run()[1]
    assert all(record["tried"] == [] and record["crops"] == {} for record in records(tmp_path / "out").values())
    assert not is_featureless(SCENE) and not is_featureless(expose(SCENE, -4))


# Files ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(taste, run, tmp_path):
    expose(SCENE, -1.5).save(tmp_path / "photos" / "a.png")
    expose(SCENE, -1.0).save(tmp_path / "photos" / "b.png")
    run()
    out = tmp_path / "out"
    (out / next(path.name for path in out.glob("b-*.json"))).unlink()
    next(out.glob("b-*-corrected.jpg")).write_text("edited by hand")
    before = {path: path.read_bytes() for path in out.iterdir()}
    status, said, errors = run()
    assert status == 1 and "b.png" in errors and "is there already: move it away" in errors
    assert "0 looked at" in said and f"1 had their suggestions in {out} already" in said
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_results_within_the_photographs_are_no_photographs(taste, run, tmp_path):
    expose(SCENE, -1.5).save(tmp_path / "photos" / "a.png")
    out = tmp_path / "photos" / "suggestions"
    run("--out", out)
    status, said, _ = run("--out", out)
    assert status == 0 and "0 looked at" in said and taste.loads == 1


def test_broken_files_cost_nothing_else(taste, run, tmp_path):
    SCENE.save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.jpg").write_text("no picture")
    status, said, errors = run()
    assert status == 1 and "b.jpg: not a JPEG" in errors and "1 looked at" in said and "1 failed" in said


def test_nothing_can_be_started(taste, run, tmp_path, monkeypatch):
    assert run()[0] == 2
    SCENE.save(tmp_path / "photos" / "a.png")
    (tmp_path / "taken").write_text("a file")
    assert run("--out", tmp_path / "taken")[0] == 2
    monkeypatch.setattr(suggest_edits, "start_model", caption_photos.start_model)
    status, _, errors = run("--model", tmp_path / "none")
    assert status == 2 and "none cannot be loaded" in errors


@pytest.mark.parametrize("arguments", [["--margin", "0"], ["--margin", "nan"], ["--threads", "0"], ["missing.jpg"]])
def test_wrong_arguments(arguments, run):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


def test_a_tiny_model(run, tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_processor().save_pretrained(tmp_path / "tiny")
    SCENE.save(tmp_path / "photos" / "a.png")
    status, said, _ = run("--model", tmp_path / "tiny", "--margin", 0.001)
    assert status == 0 and "1 looked at: " in said
    record = records(tmp_path / "out")["a"]
    image = Image.open(tmp_path / "photos" / "a.png").convert("RGB")
    model, processor = caption_photos.load_model(str(tmp_path / "tiny"), trust_remote_code=False)
    judge = suggest_edits.Judge(model, processor)
    for kind, strength in record["steps"]:
        image = corrected(image, kind, strength)
    assert judge.scores([image])[0] == pytest.approx(record["corrected_score"], abs=1e-2)
    assert record["corrected_score"] >= record["score"]
