"""Statistics of straight edges and of falloff against slow definitions."""

import math

import numpy as np
import pytest
import torch
from test_iasm import luma_of, photo

from ase_mllm.photometry import fine_statistics


def edges(degrees: float, size: int = 96) -> torch.Tensor:
    """Soft edges whose gradient points at so many degrees from the horizontal, `(1, 3, size, size)`."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    angle = math.radians(degrees)
    bands = torch.sin((x * math.cos(angle) + y * math.sin(angle)) / 3) * 0.3 + 0.5
    return bands.expand(1, 3, size, size)


@pytest.mark.parametrize("degrees", [-85, -45, -5, 0, 3, 90])
def test_straight_edges_fall_into_the_bins_of_their_direction(degrees):
    histogram = (fine_statistics(edges(degrees))[0, :90] / 4).square()
    centres = torch.arange(-89, 90, 2)
    away = (centres - degrees).abs()
    near = torch.minimum(away, 180 - away) <= 3
    assert histogram[near].sum() > 0.8 * histogram.sum()


def test_texture_counts_less_than_edges():
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    assert fine_statistics(edges(30))[0, 90] > fine_statistics(noise)[0, 90] + 0.3


def test_falloff_in_rings_by_loops():
    pixels = photo(64, 96)
    luma = luma_of(pixels[0].double().numpy())
    light = np.log(luma.reshape(16, 4, 24, 4).mean((1, 3)) + 0.02)
    smooth = np.array([[light[y : y + 3, x : x + 3].mean() for x in range(22)] for y in range(14)])
    rings: list[list[float]] = [[] for _ in range(6)]
    limits = (0.0, 0.3, 0.45, 0.6, 0.72, 0.85, 1.01)
    for row in range(12):
        for column in range(20):
            x, y = (column + 0.5) / 20 * 2 - 1, (row + 0.5) / 12 * 2 - 1
            radius = max(math.hypot(x, y), 1e-3)
            dx = smooth[row + 1, column + 2] - smooth[row + 1, column]
            dy = smooth[row + 2, column + 1] - smooth[row, column + 1]
            ring = next(i for i in range(6) if radius / math.sqrt(2) < limits[i + 1])
            rings[ring].append((dx * x * 20 + dy * y * 12) / radius / 4)
    expected = [np.mean(np.tanh(np.array(ring) / scale)) for scale in (0.05, 0.15, 0.5, 1.5) for ring in rings]
    expected += [np.mean(np.abs(np.tanh(np.array(ring) / 0.5))) for ring in rings]
    expected.append(np.mean([slope for ring in rings for slope in ring]))
    np.testing.assert_allclose(fine_statistics(pixels)[0, 91:], expected, atol=2e-3)


def test_a_vignette_turns_the_outer_slopes_down():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 128), indexing="ij")
    pixels = photo(96, 128)
    darkened = pixels * torch.exp2(-(((x.square() + y.square()) / 2) ** 1.5 * 2))
    outer = slice(91 + 6, 91 + 12)  # squeezed at 0.15
    assert (fine_statistics(darkened)[0, outer][3:] < fine_statistics(pixels)[0, outer][3:] - 0.05).all()


def test_the_smallest_and_the_emptiest_picture_have_finite_statistics():
    for pixels in (torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 64, 32), torch.rand(1, 3, 32, 32)):
        assert fine_statistics(pixels).shape == (1, 122)
        assert fine_statistics(pixels).isfinite().all()
