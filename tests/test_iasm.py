"""The saliency module: photometry and losses against slow definitions, maps, tokens, and the loss of the whole model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASPECTS, IASM, IMAGE_TOKENS, make_inputs, tiny_iasm, tiny_model

from ase_mllm import IASMConfig, ImageAestheticSaliencyModule
from ase_mllm.modeling_iasm import (
    IASMOutput,
    aspect_loss,
    saliency_losses,
    saliency_map_loss,
    score_loss,
    weighted_caption_loss,
)
from ase_mllm.photometry import contrast_maps, photometric_maps, photometric_statistics, subject_statistics


def photo(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """A smooth picture with grain and some clipping, `(1, 3, height, width)` in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(1, 3, 5, 7, generator=generator), (height, width), mode="bilinear")
    return (coarse * 2.4 - 0.7 + 0.03 * torch.randn(coarse.shape, generator=generator)).clamp(0, 1)


def luma_of(pixels: np.ndarray) -> np.ndarray:
    return 0.2126 * pixels[0] + 0.7152 * pixels[1] + 0.0722 * pixels[2]


# Photometry against slow definitions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels `(3, h, w)`, their maps `(10, h / 8, w / 8)` and statistics `(115,)`."""
    pixels = photo()
    maps = photometric_maps(pixels)
    statistics = photometric_statistics(pixels, maps)
    assert maps.shape == (1, 10, 8, 12) and statistics.shape == (1, 115)
    return pixels[0].double().numpy(), maps[0].double().numpy(), statistics[0].double().numpy()


def test_maps_of_light_and_colour_by_loops(measured):
    pixels, maps, _ = measured
    luma = luma_of(pixels)
    for row in range(8):
        for column in range(12):
            cell = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
            red, _, blue = (plane[cell] for plane in pixels)
            spread = math.sqrt(max(np.mean(luma[cell] ** 2) - np.mean(luma[cell]) ** 2, 1e-6))
            saturation = np.mean(pixels.max(0)[cell] - pixels.min(0)[cell])
            expected = [
                2 * np.mean(luma[cell]) - 1,
                4 * np.mean(blue - luma[cell]),
                4 * np.mean(red - luma[cell]),
                2 * saturation,
                4 * spread,
            ]
            np.testing.assert_allclose(maps[:4, row, column], expected[:4], atol=1e-4)
            np.testing.assert_allclose(maps[4, row, column], expected[4], atol=2e-3)  # a difference of near equals


def slow_detail(plane: np.ndarray, stride: int) -> np.ndarray:
    height, width = plane.shape
    padded = np.pad(plane, 1, mode="edge")
    difference = np.zeros_like(plane)
    for y in range(height):
        for x in range(width):
            difference[y, x] = abs(plane[y, x] - padded[y : y + 3, x : x + 3].mean())
    cells = difference.reshape(height // stride, stride, width // stride, stride).mean((1, 3))
    return np.log(cells + 1e-4) / 3 + 1.5


def halved(plane: np.ndarray) -> np.ndarray:
    return plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean((1, 3))


def test_maps_of_detail_by_loops(measured):
    pixels, maps, _ = measured
    luma = luma_of(pixels)
    finest, finer, coarse = slow_detail(luma, 8), slow_detail(halved(luma), 4), slow_detail(halved(halved(luma)), 2)
    colour = (slow_detail(pixels[2] - luma, 8) + slow_detail(pixels[0] - luma, 8)) / 2
    expected = np.stack([finest, finer, coarse, colour, 2 * (finest - finer)])
    np.testing.assert_allclose(maps[5:], expected, atol=1e-4)


def test_blur_and_noise_move_the_maps_of_detail_apart():
    sharp = photo()
    blurred = F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), mode="replicate"), 5, 1)
    noisy = (sharp + 0.1 * torch.randn(sharp.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    finest = [photometric_maps(pixels)[:, 5].mean().item() for pixels in (blurred, sharp, noisy)]
    assert finest[0] < finest[1] - 0.1 < finest[2] - 0.2


def slow_contrast(plane: np.ndarray) -> list[np.ndarray]:
    """Differences from the surround near and far, the whole and the border, in units of spread."""
    height, width = plane.shape
    spread = plane.std(ddof=1) + 0.05
    differences = []
    for reach in (2, 5):
        surround = np.zeros_like(plane)
        for y in range(height):
            for x in range(width):
                window = plane[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
                surround[y, x] = window.mean()
        differences.append((plane - surround) / spread)
    border = np.concatenate([plane[:2].ravel(), plane[-2:].ravel(), plane[:, :2].ravel(), plane[:, -2:].ravel()])
    return [*differences, (plane - plane.mean()) / spread, (plane - border.mean()) / spread]


def test_contrast_of_the_maps_by_loops(measured):
    _, maps, _ = measured
    expected = np.stack([slow_contrast(plane) for plane in maps], axis=1).reshape(40, *maps.shape[1:])
    contrasts = contrast_maps(torch.from_numpy(maps[None]).float())[0].numpy()
    np.testing.assert_allclose(contrasts, np.concatenate([np.abs(expected), expected]), atol=1e-4)


def test_contrast_is_largest_on_what_differs_and_takes_small_maps():
    maps = torch.zeros(1, 10, 4, 4)
    maps[:, 3, 2, 1] = 1.0  # a colourful position
    of_the_whole = contrast_maps(maps)[0, 20 + 3]
    assert of_the_whole.argmax() == 2 * 4 + 1 and contrast_maps(maps)[0, 0].abs().max() == 0


def test_statistics_of_the_subject_by_loops(measured):
    _, maps, _ = measured
    weights = np.random.default_rng(0).random((8, 12))
    inside = weights / weights.sum()
    around = 1 - weights / weights.max()
    around = around / around.sum()
    means = [[(plane * one).sum() for plane in maps] for one in (inside, around)]
    spreads = [
        [math.sqrt(((plane - mean) ** 2 * one).sum()) for plane, mean in zip(maps, row)]
        for one, row in zip((inside, around), means)
    ]
    expected = [*means[0], *means[1], *np.subtract(*means), *spreads[0], *spreads[1]]
    statistics = subject_statistics(torch.from_numpy(inside[None]).float(), torch.from_numpy(maps[None]).float())
    np.testing.assert_allclose(statistics[0], expected, atol=2e-3)


def test_tones_and_clipping_by_sorting(measured):
    pixels, _, statistics = measured
    luma = luma_of(pixels[:, ::2, ::2])
    tones = sorted(luma.flatten())
    ranks = [0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995]
    np.testing.assert_allclose(statistics[:11], [2 * tones[int(r * (len(tones) - 1))] - 1 for r in ranks], atol=1e-5)
    bright, dark = (
        sum(1 for tone in tones if condition(tone)) / len(tones)
        for condition in (lambda tone: tone > 0.98, lambda tone: tone < 0.02)
    )
    assert bright > 0 and dark > 0
    np.testing.assert_allclose(statistics[11:13], [4 * bright, 4 * dark], atol=1e-5)


def test_mean_spread_and_levels_of_the_maps(measured):
    _, maps, statistics = measured
    cells = maps.reshape(10, -1)
    np.testing.assert_allclose(statistics[13:23], cells.mean(1), atol=1e-5)
    np.testing.assert_allclose(statistics[23:33], cells.std(1, ddof=1), atol=1e-5)
    levels = [sorted(row)[int(r * (len(row) - 1))] for row in cells[1:] for r in (0.02, 0.1, 0.5, 0.9, 0.98)]
    np.testing.assert_allclose(statistics[33:78], levels, atol=1e-5)


def test_colour_by_tone_by_loops(measured):
    pixels, _, statistics = measured
    small = pixels[:, ::2, ::2]
    luma = luma_of(small)
    sums, weights = np.zeros((4, 2)), np.zeros(4)
    for y in range(luma.shape[0]):
        for x in range(luma.shape[1]):
            tone = luma[y, x]
            colour = np.array([small[2, y, x] - tone, small[0, y, x] - tone])
            here = [0.35 - tone, 0.3 - abs(tone - 0.5), tone - 0.65, 0.15 - np.abs(colour).max()]
            for i, weight in enumerate(here):
                sums[i] += (max(weight, 0) + 1e-4) * colour
                weights[i] += max(weight, 0) + 1e-4
    means = sums / weights[:, None]
    np.testing.assert_allclose(statistics[78:84], 4 * means[:3].flatten(), atol=1e-4)
    np.testing.assert_allclose(statistics[84:86], 8 * means[3], atol=1e-4)


def test_falloff_by_loops(measured):
    _, maps, statistics = measured
    light = (maps[0] + 1) / 2
    edges = (0.0, 0.3, 0.5, 0.65, 0.8, 1.01)
    regions: list[list[float]] = [[] for _ in range(9)]
    for row in range(8):
        for column in range(12):
            y, x = -1 + 2 * row / 7, -1 + 2 * column / 11
            radius = math.sqrt((x * x + y * y) / 2)
            for ring in range(5):
                if edges[ring] <= radius < edges[ring + 1]:
                    regions[ring].append(light[row, column])
            if radius >= 0.8:
                regions[5 + 2 * (x > 0) + (y > 0)].append(light[row, column])
    expected = [math.log(np.mean(region) + 0.02) - math.log(light.mean() + 0.02) for region in regions]
    np.testing.assert_allclose(statistics[86:95], expected, atol=1e-4)


def test_edge_directions_by_loops(measured):
    pixels, _, statistics = measured
    luma = luma_of(pixels[:, ::2, ::2])
    padded = np.pad(luma, 1, mode="edge")
    moments, total = np.zeros(10, dtype=complex), 0.0
    for y in range(luma.shape[0]):
        for x in range(luma.shape[1]):
            dy = padded[y + 2, x + 1] - padded[y, x + 1]
            dx = padded[y + 1, x + 2] - padded[y + 1, x]
            size = dx * dx + dy * dy
            total += size
            for i, order in enumerate((2, 4, 8, 12, 16, 20, 24, 28, 32, 36)):
                moments[i] += size * np.exp(1j * order * math.atan2(dy, dx))
    moments = 3 * moments / (total + 1e-4)
    np.testing.assert_allclose(statistics[95:].reshape(10, 2), np.stack([moments.real, moments.imag], 1), atol=1e-3)


def test_a_tilt_turns_the_phase_of_the_edges():
    def phase(degrees: float) -> float:
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        angle = math.radians(degrees)
        stripes = torch.sin((y * math.cos(angle) - x * math.sin(angle)) * 0.2) / 2 + 0.5
        pixels = stripes.expand(1, 3, 64, 64)
        real, imaginary = photometric_statistics(pixels, photometric_maps(pixels))[0, 95:97].tolist()
        return math.degrees(math.atan2(imaginary, real)) % 360  # of twice the angle

    assert phase(0) == pytest.approx(180, abs=1)
    assert phase(5) == pytest.approx(190, abs=1)
    assert phase(-5) == pytest.approx(170, abs=1)


# Pixels -------------------------------------------------------------------------------------------------------------


def normalised(iasm: ImageAestheticSaliencyModule, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (iasm.config.image_mean, iasm.config.image_std))
    return (pixels - mean) / std


@pytest.mark.parametrize(
    "numbers", [{}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.4, 0.8]}], ids=["default", "configured"]
)
def test_to_rgb_undoes_the_normalisation(numbers):
    iasm = tiny_iasm(**numbers)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(iasm.to_rgb(normalised(iasm, pixels)), pixels, rtol=0, atol=1e-6)
    assert iasm.to_rgb(torch.full((1, 3, 64, 64), 100.0)).max() == 1
    assert iasm.to_rgb(torch.full((1, 3, 64, 64), -100.0)).min() == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((32, 32), (64, 64)),
        ((48, 96), (32, 96)),
        ((500, 100), (128, 32)),
        ((10, 400), (32, 416)),
    ],
)
def test_images_are_resized_to_one_area_in_their_own_shape(size, expected):
    iasm = tiny_iasm()
    pixels = iasm.to_rgb(torch.zeros(1, 3, *size))
    assert pixels.shape[-2:] == expected
    assert iasm(torch.zeros(1, 3, *size)).saliency_maps.shape == (1, expected[0] // 8, expected[1] // 8)


def test_shrinking_averages():
    stripes = torch.zeros(1, 3, 256, 256)
    stripes[..., ::4] = 1.0
    iasm = tiny_iasm(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    torch.testing.assert_close(iasm.to_rgb(stripes)[..., 8:-8], torch.full((1, 3, 64, 48), 0.25), rtol=0, atol=0.02)


# Maps and tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_are_probabilities(dtype):
    outputs = tiny_iasm().to(dtype)(torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(0)))
    assert outputs.saliency_maps.shape == (3, 8, 12) and outputs.saliency_maps.dtype == torch.float32
    assert outputs.saliency_maps.min() > 0
    torch.testing.assert_close(outputs.saliency_maps.sum((1, 2)), torch.ones(3))
    assert outputs.saliency_tokens.shape == (3, 2, 32) and outputs.saliency_tokens.dtype == dtype
    assert outputs.score_logits.shape == (3, 10) and outputs.aspect_logits.shape == (3, len(ASPECTS))
    assert outputs.loss is None


@pytest.mark.parametrize("fault", ["dark", "cast"])
def test_absolute_light_and_colour_reach_the_tokens(fault):
    """Also where the backbone, whose layers normalise, says nothing at all; each token by itself."""
    iasm = tiny_iasm()
    for name, parameter in iasm.named_parameters():
        if "laterals" in name:
            parameter.data.zero_()
    summary = []
    make_summary_tokens = iasm.make_summary_tokens
    iasm.make_summary_tokens = lambda *args: summary.append(make_summary_tokens(*args)) or summary[-1]
    plain = photo(64, 64)
    changed = plain * (0.5 if fault == "dark" else torch.tensor([1.0, 0.9, 0.7]).view(1, 3, 1, 1))
    tokens, other = (iasm(normalised(iasm, pixels)).saliency_tokens for pixels in (plain, changed))
    assert (tokens - other).abs().amax((0, 2)).min() > 1e-3
    moved = (summary[0] - summary[1]).abs().amax((0, 2))
    assert moved[:3].min() > 1e-3  # pooled features
    assert moved[4:].min() > 0.1  # the two of photometry


@pytest.mark.parametrize("name", ["summary", "features"])
def test_every_token_reads_summary_and_picture(name):
    iasm, generator = tiny_iasm(), torch.Generator().manual_seed(0)
    inputs = {"features": torch.randn(1, 32, 8, 8, generator=generator), "summary": torch.randn(1, 6, 32)}
    tokens = iasm.make_saliency_tokens(**inputs, feature_maps=[])
    changed = inputs | {name: torch.randn(inputs[name].shape, generator=generator)}
    other = iasm.make_saliency_tokens(**changed, feature_maps=[])
    assert (tokens - other).abs().amax((0, 2)).min() > 1e-3


def test_features_are_pooled_under_the_map_around_it_and_everywhere():
    iasm = tiny_iasm()
    features = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    saliency_map = torch.zeros(1, 8, 8)
    saliency_map[0, 2, 3], saliency_map[0, 5, 5] = 0.75, 0.25
    pooled = iasm.make_summary_tokens(features, saliency_map, torch.zeros(1, 10, 8, 8), torch.zeros(1, 115))[0, :3]
    subject = 0.75 * features[0, :, 2, 3] + 0.25 * features[0, :, 5, 5]
    weights = 1 - saliency_map[0] / 0.75
    ground = (features[0] * weights).sum((1, 2)) / weights.sum()
    torch.testing.assert_close(pooled, torch.stack([subject, ground, features[0].mean((1, 2))]), rtol=1e-4, atol=1e-5)


def test_the_place_of_the_map_is_summary():
    iasm = tiny_iasm()
    left, right = torch.zeros(2, 1, 8, 8)
    left[0, 4, 1] = right[0, 4, 6] = 1.0
    rest = torch.zeros(1, 10, 8, 8), torch.zeros(1, 115)
    summary = [iasm.make_summary_tokens(torch.zeros(1, 32, 8, 8), one, *rest) for one in (left, right)]
    moved = (summary[0] - summary[1]).abs().amax((0, 2))
    assert moved[3] > 0.1 and moved[[0, 1, 2, 4, 5]].max() == 0


def test_light_and_detail_under_the_map_are_summary():
    iasm = tiny_iasm()
    saliency_map, maps = torch.zeros(1, 8, 8), torch.zeros(1, 10, 8, 8)
    saliency_map[0, 2, 3] = 1.0
    lit = maps.clone()
    lit[:, 0, 2, 3] = 1.0
    rest = torch.zeros(1, 32, 8, 8), saliency_map
    summary = [iasm.make_summary_tokens(*rest, planes, torch.zeros(1, 115)) for planes in (maps, lit)]
    moved = (summary[0] - summary[1]).abs().amax((0, 2))
    assert moved[3] > 0.05 and moved[[0, 1, 2, 4, 5]].max() == 0


def test_the_map_is_made_of_what_differs():
    """Also where the backbone and the maps themselves say nothing."""
    iasm = tiny_iasm()
    for name, parameter in iasm.map_pyramid.named_parameters():
        if "laterals" in name:
            parameter.data.zero_()
    iasm.map_pyramid.photometry_projection.weight.data[:, :10] = 0
    plain, spotted = torch.full((2, 1, 3, 64, 64), 0.4)
    spotted[..., 16:32, 40:56] = torch.tensor([0.9, 0.5, 0.1]).view(3, 1, 1)
    maps = [iasm(normalised(iasm, pixels)).saliency_maps for pixels in (plain, spotted)]
    assert (maps[0] - maps[1]).abs().max() > 1e-3


def test_queries_know_places():
    """The same features at other places give other tokens."""
    iasm = tiny_iasm()
    features = torch.zeros(1, 32, 8, 8)
    features[:, :, :2, :2] = torch.linspace(-1, 1, 32).square().view(1, 32, 1, 1)
    tokens = [iasm.make_saliency_tokens(planes, torch.zeros(1, 6, 32), []) for planes in (features, features.flip(-1))]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


# Losses against slow definitions ------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_score_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    distances = []
    for row, target in zip(logits, targets):
        if target.sum() == 0:
            continue
        shares, target = np.exp(row) / np.exp(row).sum(), target / target.sum()
        distances.append(sum((shares[: k + 1].sum() - target[: k + 1].sum()) ** 2 for k in range(10)) / 10)
    return sum(distances) / len(distances)


def test_score_loss_is_the_squared_earth_movers_distance():
    logits, targets = random(4, 10), random(4, 10, seed=1).abs()
    targets[2] = 0  # not rated
    expected = slow_score_loss(logits.double().numpy(), targets.double().numpy())
    assert score_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    certain = torch.eye(10)[[3]]
    assert score_loss(certain * 100, certain).item() == pytest.approx(0, abs=1e-9)
    near, far = (score_loss(torch.eye(10)[[i]] * 100, certain).item() for i in (4, 9))
    assert near == pytest.approx(0.1) and far == pytest.approx(0.6)


def slow_map_loss(maps: np.ndarray, targets: np.ndarray) -> float:
    losses = []
    for saliency_map, target in zip(maps, targets):
        if target.sum() == 0:
            continue
        target = target / target.sum()
        divergence = sum(
            q * math.log((q + 1e-8) / (p + 1e-8)) for p, q in zip(saliency_map.flat, target.flat) if q > 0
        )
        losses.append(divergence - np.corrcoef(saliency_map.flat, target.flat)[0, 1])
    return sum(losses) / len(losses)


def test_saliency_map_loss_is_divergence_less_correlation():
    maps = random(3, 48).softmax(-1).view(3, 6, 8)
    targets = random(3, 6, 8, seed=1).clamp(min=0) * 17  # any scale
    targets[1] = 0  # no truth
    expected = slow_map_loss(maps.double().numpy(), targets.double().numpy())
    assert saliency_map_loss(maps, targets).item() == pytest.approx(expected, rel=1e-4)
    assert saliency_map_loss(maps, maps).item() == pytest.approx(-1, abs=1e-4)
    finer = targets.repeat_interleave(4, 1).repeat_interleave(3, 2)  # targets come in their own resolution
    assert saliency_map_loss(maps, finer).item() == pytest.approx(expected, rel=1e-4)


def slow_aspect_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    losses = []
    for logit, target in zip(logits.flat, targets.flat):
        if target >= 0:
            probability = 1 / (1 + math.exp(-logit))
            losses.append(-target * math.log(probability) - (1 - target) * math.log(1 - probability))
    return sum(losses) / len(losses)


def test_aspect_loss_is_the_cross_entropy_of_what_is_known():
    logits = random(2, 3)
    targets = torch.tensor([[0.0, 1.0, -1.0], [0.3, -1.0, 1.0]])
    expected = slow_aspect_loss(logits.double().numpy(), targets.double().numpy())
    assert aspect_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "predicted", "nothing"),
    [
        (score_loss, random(2, 10), torch.zeros(2, 10)),
        (saliency_map_loss, random(2, 4, 4), torch.zeros(2, 4, 4)),
        (aspect_loss, random(2, 3), -torch.ones(2, 3)),
    ],
)
def test_without_any_truth_a_term_is_zero_and_so_is_its_gradient(loss, predicted, nothing):
    raw = predicted.clone().requires_grad_()
    value = loss(raw.flatten(1).softmax(-1).view_as(raw) if loss is saliency_map_loss else raw, nothing)
    value.backward()
    assert value.item() == 0
    assert torch.equal(raw.grad, torch.zeros_like(raw))


def test_targets_of_the_wrong_shape_are_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"`score_targets` has shape \(2, 5\), the model predicts \(2, 10\)"):
        score_loss(torch.zeros(2, 10), torch.ones(2, 5))
    with pytest.raises(
        ValueError, match=r"`aspect_targets` has 1 rows for 2 images; .*tiles.* let it leave them whole"
    ):
        aspect_loss(torch.zeros(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="`saliency_targets` has 3 maps for 2 images"):
        saliency_map_loss(torch.ones(2, 4, 4) / 16, torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match=r"`iasm_config.num_aspects=0`"):
        saliency_losses(IASMConfig(), IASMOutput(), aspect_targets=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`caption_weights` has shape \(3,\) for 2 samples"):
        weighted_caption_loss(torch.zeros(2, 4, 9), torch.zeros(2, 4, dtype=torch.long), torch.ones(3))


# The loss of the whole model ----------------------------------------------------------------------------------------


def training_inputs(batch_size: int = 2) -> dict[str, torch.Tensor]:
    inputs = make_inputs(batch_size)
    labels = inputs["input_ids"].clone()
    labels[:, : 1 + IMAGE_TOKENS] = -100
    generator = torch.Generator().manual_seed(3)
    return {
        **inputs,
        "labels": labels,
        "score_targets": torch.rand(batch_size, 10, generator=generator),
        "saliency_targets": torch.rand(batch_size, 16, 16, generator=generator),
        "aspect_targets": torch.randint(0, 2, (batch_size, 3), generator=generator).float(),
    }


TERMS = {"score_targets": "score_loss", "saliency_targets": "saliency_loss", "aspect_targets": "aspect_loss"}


@pytest.mark.parametrize("given", [[], ["score_targets"], ["saliency_targets"], ["aspect_targets"], list(TERMS)])
@pytest.mark.parametrize("with_labels", [True, False])
def test_each_term_counts_where_its_targets_are_given(given, with_labels):
    inputs = training_inputs()
    model = tiny_model(
        iasm_config={**IASM, "score_loss_weight": 2.0, "saliency_loss_weight": 0.5, "aspect_loss_weight": 3.0}
    )
    for name in TERMS:
        if name not in given:
            inputs.pop(name)
    labels = inputs.pop("labels")
    if with_labels:
        inputs["labels"] = labels
    outputs = model(**inputs)
    weights = {"score_targets": 2.0, "saliency_targets": 0.5, "aspect_targets": 3.0}
    parts = [weights[name] * outputs[TERMS[name]] for name in given]
    for name, term in TERMS.items():
        assert (getattr(outputs, term) is not None) == (name in given)
    assert (outputs.caption_loss is not None) == with_labels
    if with_labels:
        parts.append(outputs.caption_loss)
        expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(outputs.caption_loss, expected)
    if parts:
        torch.testing.assert_close(outputs.loss, sum(parts))
    else:
        assert outputs.loss is None


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("score_targets", torch.full((2, 10), NAN), "`score_targets` takes finite numbers from 0, got nan"),
        ("score_targets", torch.full((2, 10), -1.0), "got -1 to -1"),
        ("saliency_targets", torch.full((2, 8, 8), -0.5), "`saliency_targets` takes finite numbers from 0, got -0.5"),
        ("saliency_targets", torch.full((2, 8, 8), INFINITE), "`saliency_targets` takes finite numbers"),
        ("aspect_targets", torch.full((2, 3), 1.5), "`aspect_targets` takes finite numbers up to 1, got 1.5"),
        ("aspect_targets", torch.full((2, 3), NAN), "`aspect_targets` takes finite numbers"),
        ("caption_weights", torch.tensor([1.0, -1.0]), "`caption_weights` takes finite numbers from 0, got -1 to 1"),
        ("caption_weights", torch.tensor([NAN, 1.0]), "`caption_weights` takes finite numbers"),
    ],
)
def test_impossible_targets_are_refused_with_the_numbers(name, value, message):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs, labels=inputs["input_ids"], **{name: value})


@pytest.mark.parametrize("name", ["score_target", "rating_targets", "aspects_targets", "caption_weight"])
def test_a_misspelt_target_is_refused(name):
    with pytest.raises(TypeError, match=f"{name}.* no targets of this model, which takes .*score_targets"):
        tiny_model()(**make_inputs(), **{name: torch.ones(2, 10)})


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (256, 32)])
def test_the_smallest_image_size_is_finite(size):
    """Its rings between the centre and the corners hold few cells or none."""
    outputs = tiny_iasm(image_size=32)(torch.randn(2, 3, *size))
    assert all(outputs[name].isfinite().all() for name in ("saliency_tokens", "saliency_maps", "score_logits"))


def test_targets_without_an_image_are_refused():
    inputs = training_inputs()
    inputs.pop("pixel_values")
    inputs["input_ids"] = torch.full((2, 5), 7)
    for name in ("labels", "attention_mask", "aspect_targets"):
        inputs.pop(name)
    with pytest.raises(ValueError, match=r"\['saliency_targets', 'score_targets'\] are given, but no image was"):
        tiny_model()(**inputs)


def test_scores_of_some_samples_only():
    inputs = training_inputs()
    model = tiny_model()
    alone = model(**{name: tensor[:1] for name, tensor in inputs.items()})
    inputs["score_targets"][1] = 0
    inputs["saliency_targets"][1] = 0
    inputs["aspect_targets"][1] = -1
    together = model(**inputs)
    for term in TERMS.values():
        torch.testing.assert_close(together[term], alone[term], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unequal", [False, True])
def test_losses_of_micro_batches_add_up(unequal, weighted):
    """As the `Trainer` accumulates gradients: each micro-batch knows the target tokens of the whole step."""
    inputs = training_inputs(batch_size=4)
    if weighted:
        inputs["caption_weights"] = torch.tensor([1.0, 0.0, 2.5, 0.5])
    if unequal:  # captions count by their tokens, the other terms by their images
        inputs["labels"][0, -4:] = -100
        inputs = {name: tensor for name, tensor in inputs.items() if name not in TERMS}
    model = tiny_model()
    whole = model(**inputs).loss
    count = (inputs["labels"][:, 1:] != -100).sum()
    assert count == 4 * 6 - 4 * unequal
    halves = [{name: tensor[half] for name, tensor in inputs.items()} for half in (slice(0, 1), slice(1, 4))]
    parts = [model(**half, num_items_in_batch=count).loss for half in halves]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)
    for given in (count, count.item()):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=given).loss, whole)


def test_caption_weights():
    inputs = training_inputs()
    for name in TERMS:
        inputs.pop(name)
    model = tiny_model()
    plain = model(**inputs)
    assert plain.caption_loss is plain.loss
    ones = model(**inputs, caption_weights=torch.ones(2))
    torch.testing.assert_close(ones.loss, plain.loss)
    torch.testing.assert_close(model(**inputs, caption_weights=torch.full((2,), 3.0)).loss, 3 * plain.loss)
    first = model(**inputs, caption_weights=torch.tensor([1.0, 0.0]))
    inputs["labels"][1, -6:] = 42  # what a sample of weight 0 says is not heard
    assert torch.equal(model(**inputs, caption_weights=torch.tensor([1.0, 0.0])).loss, first.loss)
    model.zero_grad()
    first.loss.backward()
    alone = {name: inputs[name][:1] for name in inputs}
    gradient = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    model(**alone).loss.backward()
    torch.testing.assert_close(gradient, model.get_output_embeddings().weight.grad / 2, rtol=1e-4, atol=1e-6)


def test_one_number_normalises_all_colours():
    pixel_values = random(2, 3, 64, 64)
    one, three = (
        ImageAestheticSaliencyModule(IASMConfig(**{**IASM, "image_mean": mean, "image_std": std}))
        for mean, std in ((0.4, 0.3), ([0.4] * 3, [0.3] * 3))
    )
    assert torch.equal(one.to_rgb(pixel_values), three.to_rgb(pixel_values))


def test_images_of_several_sizes_are_seen_as_each_alone():
    """In the order given, whichever are batched together."""
    torch.manual_seed(0)
    iasm = ImageAestheticSaliencyModule(IASMConfig(**IASM)).eval()
    images = [random(3, *size) for size in ((64, 128), (128, 64), (64, 64), (96, 192), (64, 128))]
    with torch.no_grad():
        together = iasm(images)
        alone = [iasm(image[None]) for image in images]
    assert together.saliency_map_sizes.tolist() == [list(one.saliency_maps.shape[1:]) for one in alone]
    for i, one in enumerate(alone):
        height, width = one.saliency_maps.shape[1:]
        torch.testing.assert_close(together.saliency_maps[i, :height, :width], one.saliency_maps[0])
        assert together.saliency_maps[i].count_nonzero() == height * width
        torch.testing.assert_close(together.saliency_tokens[i], one.saliency_tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.score_logits[i], one.score_logits[0], rtol=1e-4, atol=1e-5)


def test_the_map_loss_of_padded_maps_is_the_mean_of_each_alone():
    maps = [
        random(1, height, width).flatten(1).softmax(-1).view(1, height, width) for height, width in ((4, 8), (8, 4))
    ]
    targets = random(2, 16, 16).abs()
    padded = torch.cat([torch.nn.functional.pad(one, (0, 8 - one.shape[2], 0, 8 - one.shape[1])) for one in maps])
    expected = sum(saliency_map_loss(one, target[None]) for one, target in zip(maps, targets)) / 2
    sizes = torch.tensor([[4, 8], [8, 4]])
    torch.testing.assert_close(saliency_map_loss(padded, targets, sizes), expected)
    assert not torch.isclose(saliency_map_loss(padded, targets), expected)


@pytest.mark.slow
def test_exports_with_a_batch_of_any_size():
    model = tiny_iasm()
    pixels = torch.cat([photo(32, 32, seed) for seed in range(5)])
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pixels[:2],), dynamic_shapes=({0: batch},), strict=False)
    for size in (1, 2, 5):
        with torch.no_grad():
            expected, found = model(pixels[:size]), program.module()(pixels[:size])
        for name in ("saliency_maps", "saliency_tokens", "score_logits"):
            torch.testing.assert_close(found[name], expected[name], msg=name)
