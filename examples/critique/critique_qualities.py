"""What can be measured of a finished composition: the qualities of `critique_captions.QUALITIES`.

Each is 1 where it is clearly so, 0 where it clearly is not and -1 between, or where no subject is known.

stands_out_by_light     the subject's mean brightness over the ground's, in stops of code, after the lighting feature of
                        Luo and Tang (2008), and in deviations of the ground
stands_out_by_colour    the distance of the subject's mean colour from the ground's in an opponent space (as Achanta et
                        al., 2009, do for saliency), without lightness
calm_background,        the mean step, down and across together, between neighbouring pixels of the ground at half size:
busy_background         simplicity by edges, after Ke et al. (2006)
small_in_frame,         the share of the frame that the subject covers (the subject's region, Luo and Tang, 2008)
fills_frame
complementary_colours   two opposite hues of Itten's wheel, weighted by chroma, hold most of the colour: the contrast of
                        complements of Machajdik and Hanbury (2010)
analogous_colours       one sector of that wheel holds nearly all of the colour
symmetric               the correlation of the picture with its mirror image, left to right
"""

import numpy as np
from critique_captions import QUALITIES
from critique_edits import to_opponent
from critique_pictures import LUMA, largest, mirror_likeness, smallest
from PIL import Image


# HSV hues (degrees) and where they lie on Itten's wheel: red opposite green, orange blue, yellow violet.
_HUES, _WHEEL = (0, 30, 60, 120, 240, 285, 360), (0, 60, 120, 180, 240, 300, 360)
WHEEL_STEPS = 36


def measure_qualities(image: Image.Image, coverage: np.ndarray | None) -> dict[str, float]:
    """Labels of all QUALITIES; `coverage` (float32, any size, 0..1) is what the subject covers, None where unknown."""
    labels = dict.fromkeys(QUALITIES, -1.0)
    small = image.reduce(max(1, max(image.size) // 80))
    codes = np.asarray(small).astype(np.float32) / 255
    labels |= _palette(codes)
    labels["symmetric"] = _graded(mirror_likeness(codes @ LUMA), no=0.45, yes=0.7)
    if coverage is not None and coverage.max() > 0.5:
        covered = np.asarray(Image.fromarray(coverage).resize(small.size, Image.Resampling.BOX))
        labels |= _separation(codes, covered) | _ground(image.reduce(2), coverage)
        area = float(covered.mean())
        labels["small_in_frame"] = _graded(-area, no=-0.09, yes=-0.055)
        labels["fills_frame"] = _graded(area, no=0.2, yes=0.3)
    return labels


def _graded(value: float, *, no: float, yes: float) -> float:
    return 1.0 if value >= yes else 0.0 if value <= no else -1.0


def _separation(codes: np.ndarray, covered: np.ndarray) -> dict[str, float]:
    """How far the subject is from the ground in light and in colour."""
    inside, outside = covered > 0.6, covered < 0.1
    if inside.sum() < 12 or outside.sum() < 100:
        return {}
    luma, lab = codes @ LUMA, to_opponent(codes)
    subject, ground, spread = float(luma[inside].mean()), float(luma[outside].mean()), float(luma[outside].std())
    stops = abs(np.log2((subject + 0.05) / (ground + 0.05)))
    apart = float(np.hypot(*(lab[inside].mean(0) - lab[outside].mean(0))[1:]))
    scatter = float(np.sqrt(lab[outside].var(0)[1:].sum()))
    return {
        "stands_out_by_light": _graded(min(stops, abs(subject - ground) / (spread + 0.02)), no=0.45, yes=0.8),
        "stands_out_by_colour": _graded(min(apart / 0.06, apart / (0.8 * scatter + 0.012)), no=0.6, yes=1.0),
    }


def _ground(half: Image.Image, coverage: np.ndarray) -> dict[str, float]:
    """How calm or busy the ground is, of a picture at half its size."""
    luma = np.asarray(half.convert("L")).astype(np.float32) / 255
    ground = np.asarray(Image.fromarray(coverage).resize(half.size, Image.Resampling.BOX))[1:, 1:] < 0.05
    if ground.sum() < 200:
        return {}
    steps = np.abs(luma[1:, 1:] - luma[:-1, 1:]) + np.abs(luma[1:, 1:] - luma[1:, :-1])
    step = float(steps[ground].mean())
    return {
        "calm_background": _graded(-step, no=-0.045, yes=-0.028),
        "busy_background": _graded(step, no=0.06, yes=0.085),
    }


def _palette(codes: np.ndarray) -> dict[str, float]:
    """Complementary and analogous colours; a picture with next to no colour has neither."""
    chroma = largest(codes) - smallest(codes)
    level = float(chroma.mean())
    if level < 0.07:
        absent = 0.0 if level < 0.04 else -1.0
        return {"complementary_colours": absent, "analogous_colours": absent}
    shares = wheel_shares(codes, chroma)
    sums = _window(shares, 7)  # of 70 degrees
    opposite = np.roll(sums, WHEEL_STEPS // 2)
    # Of two opposite hues the lesser has to hold a fifth.
    clear = float((np.minimum(1, np.minimum(sums, opposite) / 0.2) * (sums + opposite)).max())
    return {
        "complementary_colours": _graded(clear, no=0.6, yes=0.8),
        "analogous_colours": _graded(float(sums.max()), no=0.75, yes=0.92),
    }


def wheel_shares(codes: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Shares of the chroma by hue on Itten's wheel, in WHEEL_STEPS steps from red on."""
    strong = np.where(chroma > 0.08, chroma, 0)
    red, green, blue = np.moveaxis(codes, -1, 0)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    steps = (np.interp(hue, _HUES, _WHEEL) / 360 * WHEEL_STEPS).astype(np.int64) % WHEEL_STEPS
    counts = np.bincount(steps.ravel(), strong.ravel(), WHEEL_STEPS)
    return counts / max(counts.sum(), 1e-6)


def _window(shares: np.ndarray, width: int) -> np.ndarray:
    """Sums over `width` neighbouring steps, around the wheel."""
    return sum(np.roll(shares, shift) for shift in range(-(width // 2), width - width // 2))
