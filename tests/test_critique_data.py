"""The critique generator, on a small pool of generated pictures: no real photograph is needed."""

import json
import pickle
from pathlib import Path

import critique_captions
import critique_data
import critique_edits
import critique_pictures
import critique_qualities
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
    QUALITIES,
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


def _mild(**changes) -> critique_edits.Edits:
    plain = {"exposure": 0, "contrast": 1, "warmth": 0, "tint": 0, "saturation": 1, "vignette": 0, "noise": 0}
    return critique_edits.Edits(**plain | changes)


@pytest.mark.parametrize(
    ("change", "way", "names", "figure"),
    [
        ({"exposure": 1.2}, "exposure_way", ("gamma", "film"), "light"),
        ({"exposure": -1.5}, "exposure_way", ("gamma", "film"), "light"),
        ({"contrast": 1.7}, "contrast_way", ("sigmoid",), "spread"),
        ({"contrast": 0.5}, "contrast_way", ("sigmoid",), "spread"),
        ({"warmth": 0.6}, "cast_way", ("opponent", "filter"), "warmth"),
        ({"warmth": -0.6}, "cast_way", ("opponent", "filter"), "warmth"),
        ({"saturation": 1.8}, "saturation_way", ("hsv", "opponent"), "chroma"),
        ({"saturation": 0.4}, "saturation_way", ("hsv", "opponent"), "chroma"),
    ],
)
def test_every_way_of_an_edit_changes_as_much_as_the_plain_one(critique_sources, change, way, names, figure):
    photo = critique_sources["train"].photos[0].normal.resize((240, 180))
    rng = np.random.default_rng(0)
    before = _figures(critique_data.develop(photo, _mild(), rng))[figure]
    plain = critique_data.develop(photo, _mild(**change), rng)
    for name in names:
        other = critique_data.develop(photo, _mild(**change, **{way: name}), rng)
        assert _figures(other)[figure] - before == pytest.approx(_figures(plain)[figure] - before, rel=0.1)
        assert np.abs(np.subtract(other, plain, dtype=np.int16)).mean() > 0.5, "it is another way"


def test_every_noise_is_as_strong_and_its_own():
    rng, codes = (
        np.random.default_rng(0),
        np.tile(np.linspace(0.05, 0.95, 240, dtype=np.float32)[:, None], (180, 1, 3)),
    )
    fields = {way: critique_edits.grain(codes, 0.06, way, rng) for way in ("white", "photon", "chroma", "coarse")}
    for way, field in fields.items():
        assert field.std() == pytest.approx(0.06, rel=0.08), way
    dark, bright = (fields["photon"][:, part].std() for part in (slice(20, 60), slice(-60, None)))
    assert dark > 1.2 * bright and fields["white"][:, :40].std() < 1.05 * fields["white"].std()
    assert (fields["chroma"] @ critique_pictures.LUMA).std() < 0.02
    apart = {way: np.diff(field, axis=1).std() / field.std() for way, field in fields.items()}
    assert apart["coarse"] < 0.9 * apart["white"]


def test_every_blur_takes_as_much_detail(critique_sources):
    photo, rng = critique_sources["train"].photos[0].normal, np.random.default_rng(0)
    left = {way: _gradient(critique_edits.blurred(photo, 4.0, way, rng)) for way in critique_edits.BLURS}
    for way, detail in left.items():
        assert 0.8 * left["gaussian"] < detail < 1.6 * left["gaussian"] < _gradient(photo), way
    pictures = {critique_edits.blurred(photo, 4.0, way, rng).tobytes() for way in critique_edits.BLURS}
    assert len(pictures) == len(critique_edits.BLURS)


def _gradient(image: Image.Image) -> float:
    luma = np.asarray(image.convert("L")).astype(np.float32)
    return float(np.hypot(np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1]).mean())


@pytest.mark.parametrize(
    "options", [{"norm": 5.0}, {"cos4": True}, {"start": 0.4}, {"power": 2.0}, {"middle": (0.1, -0.1)}]
)
def test_every_falloff_takes_as_much_light_from_the_corners(options):
    def corners(falloff):
        factors = critique_edits.falloff_factors(falloff, 1.5, (320, 240))
        return np.mean(
            [factors[y, x].mean() for y in (slice(30), slice(-30, None)) for x in (slice(40), slice(-40, None))]
        )

    plain, other = critique_edits.Falloff(), critique_edits.Falloff(**options)
    assert corners(other) == pytest.approx(corners(plain), rel=0.08)
    pair = [critique_edits.falloff_factors(each, 1.5, (320, 240)) for each in (plain, other)]
    assert np.abs(pair[0] - pair[1]).max() > 0.05


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


def test_one_light_may_pass_for_another_but_not_for_black_and_white():
    labels = dict.fromkeys(FAULTS, 1.0)
    styles = critique_styles.style_labels(labels, ("foggy",), set(), False)
    assert styles == {"monochrome": 0.0, "high_key": -1.0, "low_key": -1.0, "silhouette": -1.0, "foggy": 1.0}
    assert (labels["low_contrast"], labels["muted"], labels["noisy"]) == (0.0, -1.0, 1.0)
    for toned, cast in ((False, 0.0), (True, -1.0)):
        labels = dict.fromkeys(FAULTS, 1.0)
        styles = critique_styles.style_labels(labels, ("monochrome",), {"low_key"}, toned)
        assert styles == {"monochrome": 1.0, "high_key": 0.0, "low_key": -1.0, "silhouette": 0.0, "foggy": 0.0}
        assert (labels["muted"], labels["warm_cast"]) == (0.0, cast)


def test_only_what_has_a_subject_is_put_in_its_light():
    rng = np.random.default_rng(0)
    plain = {style for _ in range(200) for style in critique_styles.draw_styles(rng, cutout=False, subject=False)}
    assert plain == {"monochrome", "low_key", "foggy"}
    masked = {style for _ in range(200) for style in critique_styles.draw_styles(rng, cutout=False, subject=True)}
    assert masked == plain | {"high_key"}


def test_a_silhouette_is_dark_on_light_and_fog_spares_what_is_near(critique_sources):
    photo, rng = critique_sources["train"].photos[0].normal.resize((320, 240)), np.random.default_rng(0)
    coverage = np.zeros((240, 320), np.float32)
    coverage[140:220, 120:200] = 1
    inside, ground = coverage > 0.5, np.zeros_like(coverage, bool)
    ground[:100] = True
    luma = {}
    for style in ("silhouette", "foggy", "low_key", "high_key"):
        picture = critique_styles.apply_light(style, photo, coverage, rng)
        luma[style] = np.asarray(picture).astype(np.float32) @ critique_pictures.LUMA / 255
    plain = np.asarray(photo).astype(np.float32) @ critique_pictures.LUMA / 255
    assert luma["silhouette"][inside].mean() < 0.12 and luma["silhouette"][ground].mean() > 0.6
    assert luma["foggy"][ground].std() < 0.5 * plain[ground].std() < luma["foggy"][inside].std() * 1.5
    assert luma["low_key"][ground].mean() < 0.2 < luma["low_key"][inside].mean()
    assert luma["high_key"][ground].mean() > 0.8 and luma["high_key"].max() <= 1
    assert (luma["high_key"] > 0.99).mean() < 0.05, "a high key burns nothing out"


def test_what_looks_like_a_style_is_unknown(critique_sources):
    photo = critique_sources["train"].photos[0].normal
    assert critique_styles.looks_like(photo, None) <= {"silhouette"}
    assert "monochrome" in critique_styles.looks_like(photo.convert("L").convert("RGB"), None)
    assert "low_key" in critique_styles.looks_like(photo.point(lambda code: code // 4), None)
    assert "high_key" in critique_styles.looks_like(photo.point(lambda code: 200 + code // 6), None)
    assert "foggy" in critique_styles.looks_like(photo.point(lambda code: 100 + code // 4), None)


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


def _scene(ground: tuple, subject: tuple, size: int = 80, noise: int = 0) -> tuple[Image.Image, np.ndarray]:
    pixels = np.full((240, 320, 3), ground, np.int16)
    pixels += (
        np.random.default_rng(0).integers(-noise, noise + 1, (60, 80, 1)).repeat(4, 0).repeat(4, 1).astype(np.int16)
    )
    coverage = np.zeros((240, 320), np.float32)
    rows, columns = slice(120 - size // 2, 120 + size // 2), slice(160 - size // 2, 160 + size // 2)
    pixels[rows, columns], coverage[rows, columns] = subject, 1
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), coverage


@pytest.mark.parametrize(
    ("quality", "yes", "no"),
    [
        ("stands_out_by_light", _scene((40, 40, 40), (200, 200, 200)), _scene((120, 120, 120), (130, 130, 130), noise=40)),
        ("stands_out_by_colour", _scene((60, 90, 60), (200, 40, 40)), _scene((90, 90, 90), (95, 90, 90))),
        ("calm_background", _scene((90, 90, 90), (200, 40, 40)), _scene((90, 90, 90), (200, 40, 40), noise=90)),
        ("busy_background", _scene((120, 110, 90), (200, 40, 40), noise=120), _scene((90, 90, 90), (200, 40, 40))),
        ("small_in_frame", _scene((90, 90, 90), (200, 40, 40), 40), _scene((90, 90, 90), (200, 40, 40), 100)),
        ("fills_frame", _scene((90, 90, 90), (200, 40, 40), 200), _scene((90, 90, 90), (200, 40, 40), 80)),
        ("complementary_colours", _scene((40, 70, 200), (230, 130, 30), 130), _scene((40, 70, 200), (40, 90, 200), 130)),
        ("analogous_colours", _scene((200, 60, 30), (220, 140, 40)), _scene((40, 70, 200), (230, 130, 30), 130)),
    ],
)  # fmt: skip
def test_qualities_are_told_apart(quality, yes, no):
    assert critique_qualities.measure_qualities(*yes)[quality] == 1
    assert critique_qualities.measure_qualities(*no)[quality] == 0


def test_qualities_of_a_subject_need_one():
    labels = critique_qualities.measure_qualities(_scene((40, 70, 200), (230, 130, 30))[0], None)
    assert tuple(labels) == QUALITIES
    assert {labels[quality] for quality in QUALITIES[:6]} == {-1.0}


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
    assert 1 <= sum(sample["aspects"][symmetric] == 1 for sample in made) < 25


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
