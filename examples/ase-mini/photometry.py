"""Photometry in absolute light and colour, which the normalisation layers of a network would throw away.

Every measure and size here is this project's own choice, except where a source is named.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F


SALIENCY_STRIDE = 8  # pixels of the IASM's input per position of the maps
NUM_MAPS = 10  # of `photometric_maps`
NUM_CONTRASTS = 8 * NUM_MAPS  # of `contrast_maps`
NUM_STATISTICS = 115  # of `photometric_statistics`
NUM_FINE_STATISTICS = 122  # of `fine_statistics`
NUM_SUBJECT_STATISTICS = 5 * NUM_MAPS  # of `subject_statistics`
NUM_GEOMETRY = 24  # of `map_geometry`


def _colour_planes(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB `(n, 3, h, w)` to luma `(n, 1, h, w)` and the colour differences B - Y, R - Y `(n, 2, h, w)`."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=pixels.dtype).view(1, 3, 1, 1)
    weights = weights.to(pixels.device, non_blocking=True)  # or a GPU would wait for its host
    luma = (pixels * weights).sum(1, keepdim=True)
    return luma, torch.cat([pixels[:, 2:3] - luma, pixels[:, 0:1] - luma], dim=1)


def _smooth(plane: torch.Tensor) -> torch.Tensor:
    """The 3x3 mean, without a margin: two pixels less along each side."""
    # sums of slices: on a CPU a pooling of one plane takes several times as long
    rows = plane[..., :-2, :] + plane[..., 1:-1, :] + plane[..., 2:, :]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


def _detail(planes: torch.Tensor, stride: int) -> torch.Tensor:
    """Log mean absolute difference from the 3x3 mean, per cell of `stride` pixels, about -1 to 1."""
    smooth = _smooth(F.pad(planes, (1, 1, 1, 1), mode="replicate"))
    return (F.avg_pool2d((planes - smooth).abs(), stride) + 1e-4).log() / 3 + 1.5


def photometric_maps(pixels: torch.Tensor) -> torch.Tensor:
    """
    Local photometry of RGB images in 0..1 `(n, 3, h, w)`, `h` and `w` multiples of 32.

    Returns `(n, 10, h / 8, w / 8)`: luma, two colour differences, saturation, spread of luma, luma detail at three
    scales, colour detail, and how fast detail falls from the finest scale to the next.
    """
    luma, chroma = _colour_planes(pixels)
    red, green, blue = pixels.split(1, dim=1)
    saturation = red.maximum(green).maximum(blue) - red.minimum(green).minimum(blue)
    planes = torch.cat([luma, chroma, saturation, luma.square()], dim=1)
    mean, colour, saturated, square = F.avg_pool2d(planes, SALIENCY_STRIDE).split([1, 2, 1, 1], dim=1)
    spread = (square - mean.square()).clamp(min=1e-6).sqrt()
    fine, colour_detail = _detail(planes[:, :3], SALIENCY_STRIDE).split([1, 2], dim=1)
    half = F.avg_pool2d(luma, 2)
    middle, coarse = _detail(half, SALIENCY_STRIDE // 2), _detail(F.avg_pool2d(half, 2), SALIENCY_STRIDE // 4)
    maps = [
        mean * 2 - 1,
        colour * 4,
        saturated * 2,
        spread * 4,
        fine,
        middle,
        coarse,
        colour_detail.mean(1, keepdim=True),
        (fine - middle) * 2,
    ]
    return torch.cat(maps, dim=1)


def contrast_maps(maps: torch.Tensor) -> torch.Tensor:
    """
    How each position differs from the rest of its picture: `photometric_maps` `(n, c, h, w)` to `(n, 8 * c, h, w)`.

    Differences from the surround near and far, from the whole and from the border, in units of the picture's own spread,
    then their sizes. A subject is what differs: a convolution sees only its surround, and learning the rest takes many
    pictures. (Centre and surround are those of Itti, Koch and Niebur, 1998; the sizes are this project's choice.)
    """
    spread = maps.flatten(2).std(2)[..., None, None] + 0.05
    widest = 2 * min(maps.shape[-2:]) - 1
    surrounds = [
        F.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False) for side in (min(5, widest), min(11, widest))
    ]
    border = [maps[:, :, :2], maps[:, :, -2:], maps[:, :, :, :2], maps[:, :, :, -2:]]
    whole, border = (cells.mean(2)[..., None, None] for cells in (maps.flatten(2), _cat_cells(border)))
    differences = torch.cat([(maps - other) / spread for other in (*surrounds, whole, border)], dim=1)
    return torch.cat([differences.abs(), differences], dim=1)


def _cat_cells(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten(2) for part in maps], dim=2)


def photometric_statistics(pixels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """
    Photometry of whole images: RGB in 0..1 `(n, 3, h, w)` and their `photometric_maps`, to `(n, 115)`.

    In order: quantiles and clipping of luma, mean and spread of all maps, quantiles of colour, saturation and detail,
    colour by tone, brightness from the centre to the corners, and the directions of edges.
    """
    luma, chroma = _colour_planes(pixels[:, :, ::2, ::2])
    tones = luma.flatten(1).sort(dim=1).values
    ranks = [0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995]
    tones_at = tones[:, [int(rank * (tones.shape[1] - 1)) for rank in ranks]]
    clipped = torch.cat([(luma > 0.98).float().flatten(2).mean(2), (luma < 0.02).float().flatten(2).mean(2)], dim=1)

    cells = maps.flatten(2)
    levels = cells[:, 1:].sort(dim=2).values  # without luma, whose tones are finer
    levels_at = levels[:, :, [int(rank * (levels.shape[2] - 1)) for rank in (0.02, 0.1, 0.5, 0.9, 0.98)]].flatten(1)

    # colour where the picture is dark, middling and bright: a cast tints all tones, an object only its own
    tone_weights = torch.cat([(0.35 - luma), 0.3 - (luma - 0.5).abs(), (luma - 0.65)], dim=1).clamp(min=0) + 1e-4
    colour_by_tone = torch.einsum("nthw,nchw->ntc", tone_weights, chroma) / tone_weights.sum((2, 3)).unsqueeze(-1)
    neutral = (0.15 - chroma.abs().amax(1, keepdim=True)).clamp(min=0) + 1e-4
    neutral_colour = (neutral * chroma).sum((2, 3)) / neutral.sum((2, 3))

    return torch.cat(
        [
            tones_at * 2 - 1,
            clipped * 4,
            cells.mean(2),
            cells.std(2),
            levels_at,
            colour_by_tone.flatten(1) * 4,
            neutral_colour * 8,
            _falloff(maps[:, 0]),
            _edge_directions(luma),
        ],
        dim=1,
    )


def _falloff(luma: torch.Tensor) -> torch.Tensor:
    """Brightness of five rings and four corners against the whole, `(n, h, w)` in -1..1 to `(n, 9)`."""
    height, width = luma.shape[1:]
    y = torch.linspace(-1, 1, height, device=luma.device).view(-1, 1)
    x = torch.linspace(-1, 1, width, device=luma.device).view(1, -1)
    radius = ((x.square() + y.square()) / 2).sqrt()
    edges = (0.0, 0.3, 0.5, 0.65, 0.8, 1.01)
    regions = [(radius >= low) & (radius < high) for low, high in pairwise(edges)]
    regions += [(radius >= 0.8) & (x * sx > 0) & (y * sy > 0) for sx in (-1, 1) for sy in (-1, 1)]
    regions = torch.stack(regions).flatten(1)
    regions = (regions | ~regions.any(1, keepdim=True)).float()  # a ring between few cells is as bright as the whole
    light = ((luma + 1) / 2).flatten(1)
    means = light @ (regions / regions.sum(1, keepdim=True)).T
    return (means + 0.02).log() - (light.mean(1, keepdim=True) + 0.02).log()


def _edge_directions(luma: torch.Tensor) -> torch.Tensor:
    """Circular moments of gradient directions, `(n, 1, h, w)` to `(n, 20)`; a tilt turns their phase."""
    dx = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    dy = dx[..., 2:, 1:-1] - dx[..., :-2, 1:-1]
    dx = dx[..., 1:-1, 2:] - dx[..., 1:-1, :-2]
    size = (dx.square() + dy.square()).flatten(1)
    angle = torch.atan2(dy, dx).flatten(1)
    orders = torch.tensor([2, 4, 8, 12, 16, 20, 24, 28, 32, 36], dtype=luma.dtype)
    angles = angle.unsqueeze(1) * orders.to(luma.device, non_blocking=True).view(1, -1, 1)
    moments = torch.stack([angles.cos(), angles.sin()], dim=2).flatten(1, 2) @ size.unsqueeze(2)
    return moments.squeeze(2) / (size.sum(1, keepdim=True) + 1e-4) * 3


def fine_statistics(pixels: torch.Tensor) -> torch.Tensor:
    """
    What small tilts and soft vignettes are seen by: RGB in 0..1 `(n, 3, h, w)` to `(n, 122)`.

    In order: a histogram of the directions of straight edges in bins of two degrees, its weight, and how light falls
    from the middle outwards in six rings.
    """
    luma, _ = _colour_planes(pixels)
    return torch.cat([_straight_edges(luma), _radial_gradients(luma)], dim=1)


def _straight_edges(luma: torch.Tensor) -> torch.Tensor:
    """
    Directions of edges that run straight through their cell, `(n, 1, h, w)` to `(n, 91)`.

    The structure tensor of gradients of a low-passed picture, averaged over cells; a cell counts by its coherence, which
    is 1 for one straight edge and 0 for texture (Bigun and Granlund, 1987).
    """
    smooth = _smooth(_smooth(luma))
    dx = smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2]
    dy = smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1]
    products = torch.cat([dx.square(), dy.square(), dx * dy], dim=1)
    xx, yy, xy = F.avg_pool2d(products, 8, 4, ceil_mode=True).flatten(2).unbind(1)
    energy = xx + yy
    coherence = ((xx - yy).square() + 4 * xy.square() + 1e-12).sqrt() / (energy + 1e-6)
    angle = torch.atan2(2 * xy, xx - yy) * (90 / torch.pi)  # of the gradient, -90..90 degrees
    centres = torch.arange(-89, 90, 2, device=luma.device, dtype=luma.dtype)
    away = (angle.unsqueeze(-1) - centres).abs()
    away = torch.minimum(away, 180 - away)
    weight = energy.clamp(min=0).sqrt() * coherence.clamp(max=1) ** 4
    counts = (weight.unsqueeze(-1) * (1 - away / 2).clamp(min=0)).sum(1)
    total = weight.sum(1, keepdim=True)
    return torch.cat(
        [(counts / (total + 1e-3)).sqrt() * 4, (weight.mean(1, keepdim=True) + 1e-4).log() / 2 + 2], dim=1
    )


def _radial_gradients(luma: torch.Tensor) -> torch.Tensor:
    """
    How log light falls from the middle outwards, in six rings and the whole, `(n, 1, h, w)` to `(n, 31)`.

    Of each ring the means of its slopes, squeezed at four scales, and of their size. A vignette moves most slopes of the
    outer rings a little; a dark corner of the scene moves a few by much, which squeezing leaves out.
    """
    light = (F.avg_pool2d(luma, 4) + 0.02).log()
    light = _smooth(light)[:, 0]
    dx, dy = light[:, 1:-1, 2:] - light[:, 1:-1, :-2], light[:, 2:, 1:-1] - light[:, :-2, 1:-1]
    height, width = dx.shape[1:]
    x, y = _positions(dx)
    radius = (x.square() + y.square()).sqrt().clamp(min=1e-3)
    # a half side of the picture as the unit of length, whatever its size
    slope = ((dx * x * width + dy * y * height) / radius / 4).flatten(1)
    edges = (0.0, 0.3, 0.45, 0.6, 0.72, 0.85, 1.01)
    rings = torch.stack([(radius / 2**0.5 >= low) & (radius / 2**0.5 < high) for low, high in pairwise(edges)])
    rings = rings.flatten(1)
    rings = (rings | ~rings.any(1, keepdim=True)).float()  # a ring between few cells is as the whole
    weights = (rings / rings.sum(1, keepdim=True)).T
    squeezed = [(slope / scale).tanh() @ weights for scale in (0.05, 0.15, 0.5, 1.5)]
    sizes = (slope / 0.5).tanh().abs() @ weights
    return torch.cat([*squeezed, sizes, slope.mean(1, keepdim=True).clamp(-4, 4)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# What a saliency map covers
# ---------------------------------------------------------------------------------------------------------------------


def _positions(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates x and y of a map's positions, -1..1, each `(h, w)`."""
    height, width = features.shape[-2:]
    x = (torch.arange(width, device=features.device) + 0.5) / width * 2 - 1
    y = (torch.arange(height, device=features.device) + 0.5) / height * 2 - 1
    return x.expand(height, width), y.unsqueeze(1).expand(height, width)


def position_features(features: torch.Tensor) -> torch.Tensor:
    """Coordinates and their products up to second order, `(1, 5, h, w)`: what a head needs to know the middle."""
    x, y = _positions(features)
    return torch.stack([x, y, x.square(), y.square(), x * y]).unsqueeze(0).to(features.dtype)


def inside_and_around(saliency_maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map as weights of the subject's positions and of all others, each `(n, h * w)` with sum 1."""
    inside = saliency_maps.flatten(1)
    around = 1 - inside / inside.amax(1, keepdim=True)
    return inside, around / around.sum(1, keepdim=True).clamp(min=1e-6)


def subject_statistics(saliency_maps: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """
    Photometry under the map and around it, `(n, h, w)` and `photometric_maps` to `(n, 50)`.

    In order: means of the subject, of the rest, their differences, spreads of the subject and of the rest. Whether the
    subject or what lies behind it is in focus is such a difference.
    """
    weights = torch.stack(inside_and_around(saliency_maps), dim=1)
    cells = maps.flatten(2).transpose(1, 2)
    means = weights @ cells  # (n, 2, 10)
    spreads = (weights @ cells.square() - means.square()).clamp(min=1e-6).sqrt()
    return torch.cat([means.flatten(1), means[:, 0] - means[:, 1], spreads.flatten(1)], dim=1)


def map_geometry(saliency_maps: torch.Tensor) -> torch.Tensor:
    """Where the map lies and how far it reaches, `(n, h, w)` to `(n, 24)`: eight columns, eight rows, eight moments."""
    x, y = _positions(saliency_maps)
    columns = F.adaptive_avg_pool2d(saliency_maps.sum(1, keepdim=True).unsqueeze(1), (1, 8)).flatten(1)
    rows = F.adaptive_avg_pool2d(saliency_maps.sum(2, keepdim=True).unsqueeze(1), (8, 1)).flatten(1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (saliency_maps * values).sum((1, 2))

    mean_x, mean_y = mean(x), mean(y)
    positions = saliency_maps[0].numel()
    moments = [
        mean_x * 2,
        mean_y * 2,
        (mean(x.square()) - mean_x.square()).clamp(min=1e-6).sqrt(),
        (mean(y.square()) - mean_y.square()).clamp(min=1e-6).sqrt(),
        mean((saliency_maps * positions + 1e-4).log()) / 4,
        (saliency_maps.amax((1, 2)) * positions + 1e-4).log() / 4,
        mean(((x.abs() > 0.8) | (y.abs() > 0.8)).float()) * 2,
        mean(((x.abs() < 0.2) & (y.abs() < 0.5)).float()) * 2,
    ]
    sizes = columns * saliency_maps.shape[2], rows * saliency_maps.shape[1]
    return torch.cat([*sizes, torch.stack(moments, dim=1)], dim=1)
