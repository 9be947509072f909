"""The edits, styles and qualities of the critique generator, each by itself."""

import critique_data
import critique_edits
import critique_pictures
import critique_qualities
import critique_styles
import numpy as np
import pytest
from critique_captions import FAULTS, QUALITIES
from PIL import Image
from test_critique_data import _figures


pytestmark = pytest.mark.slow


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


def test_edits_keep_the_light_of_a_style_and_vary_the_tint(critique_sources):
    dark = critique_sources["train"].photos[0].normal.point(lambda code: code // 3)
    measures = critique_data.measure(dark)
    for styles, lifted in (((), True), (("monochrome",), True), (("low_key",), False)):
        edits = critique_edits.draw_edits({}, measures, np.random.default_rng(0), styles)
        assert (edits.exposure > 0.3) == lifted
    rng = np.random.default_rng(0)
    tints = [abs(critique_edits.draw_edits({}, measures, rng).tint) for _ in range(100)]
    assert 0.08 < max(tints) <= 0.15 and np.median(tints) < 0.04


def test_faults_that_look_like_a_style():
    assert critique_data._lookalikes({"muted": 1.2, "overexposed": 1.0}) == set()
    assert critique_data._lookalikes({"muted": 2.0}) == {"monochrome"}
    assert critique_data._lookalikes({"low_contrast": 1.0, "overexposed": 1.0}) == {"foggy", "high_key"}


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
