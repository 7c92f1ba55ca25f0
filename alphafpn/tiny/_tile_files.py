"""Tiles as image files: written so that none is ever half there, and read back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageChops

from alphafpn.tiny._coco import Source


def read_tile(tile: Mapping[str, Any], images: Source) -> Image.Image:
    """Reads a tile's pixels, from its own file or from its region in the whole image's.

    Args:
        tile: An entry of `images` in what `cut_dataset` returned.
        images: Folder that its `file_name` starts from.

    Returns:
        The tile in RGB, as `torchvision.datasets.CocoDetection` would give it.

    Raises:
        ValueError: If the file is no image, or too small.

    Examples:
        >>> import tempfile
        >>> tile = {"id": 1, "width": 4, "height": 3, "corner": [5, 0, 9, 3], "file_name": "a.png"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (9, 6)).save(Path(folder, "a.png"))
        ...     read_tile(tile, folder).size
        (4, 3)
    """
    path = Path(images) / tile["file_name"]
    image = _open(path)
    if image.size == (tile["width"], tile["height"]):
        return image
    _, _, right, bottom = tile["corner"]
    if right > image.width or bottom > image.height:
        expected = f"at least {right} x {bottom} for tile {tile['id']}"
        raise ValueError(f"{path}: {image.width} x {image.height} pixels, expected {expected}")
    return image.crop(tile["corner"])


def write_tiles(
    cut: dict[str, Any], sizes: Mapping[int, tuple[int, int]], images: Path, out: Path, name: str
) -> None:
    """Writes every tile as `out/images/*.png`, and `cut` last of all as `out/annotations.json`.

    Each file is written elsewhere and moved to its place when it is complete. What is in its place
    already must be the same: so a run that was killed goes on where it stopped, two at once do no
    harm, and nothing that belongs to someone else is lost.

    Args:
        cut: The dataset of tiles; their `file_name`s are replaced by those of their files.
        sizes: (width, height) of each original image, by its id.
        images: Folder that the original `file_name`s start from.
        out: Folder to write to.
        name: What errors call the dataset.

    Raises:
        FileExistsError: If there is another file where one would be written.
        ValueError: If a `file_name` is missing, leads out of the folder or is not the only one of
            its name, or if a file is no image or has another size.
    """
    sources = [_name_file(tile, name) for tile in cut["images"]]
    owner: dict[str, str] = {}
    for source, tile in zip(sources, cut["images"], strict=True):
        if owner.setdefault(tile["file_name"], source) != source:
            found = f"images {owner[tile['file_name']]!r} and {source!r}"
            raise ValueError(f"{name}: {found}, expected names that differ before the suffix")
    content = json.dumps(cut, allow_nan=False).encode()
    annotations = out / "annotations.json"
    finished = _is_there(annotations, content)

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
        unfinished = Path(partial) / "file"
        pairs = zip(sources, cut["images"], strict=True)
        for source, group in groupby(pairs, key=lambda pair: pair[0]):
            tiles = [tile for _, tile in group]
            image = _open(images / source)
            width, height = sizes[tiles[0]["original_image_id"]]
            if image.size != (width, height):
                found = f"{image.width} x {image.height} pixels"
                expected = f"{width} x {height} as in {name}"
                raise ValueError(f"{images / source}: {found}, expected {expected}")
            for tile in tiles:
                region = image.crop(tile["corner"])
                path = out / "images" / tile["file_name"]
                if not _is_there(path, region):
                    region.save(unfinished, "PNG")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(unfinished, path)
        if not finished:
            unfinished.write_bytes(content)
            os.replace(unfinished, annotations)


def _name_file(tile: dict[str, Any], name: str) -> str:
    """Gives a tile the name of its own file, and returns that of its image's."""
    source = tile.get("file_name")
    expected = "the name of a file in the folder of images"
    if not isinstance(source, str):
        found = f"image {tile['original_image_id']} has file_name {source!r}"
        raise ValueError(f"{name}: {found}, expected {expected}")
    path = PurePosixPath(source)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"{name}: file_name {source!r}, expected {expected}")
    region = "_".join(map(str, tile["corner"]))
    tile["file_name"] = str(path.with_name(f"{path.stem}_{region}.png"))
    return source


def _is_there(path: Path, content: bytes | Image.Image) -> bool:
    if not path.exists():
        return False
    if isinstance(content, bytes):
        same = path.read_bytes() == content
    else:
        try:
            image = _open(path)
        except ValueError:
            same = False
        else:
            same = (
                image.size == content.size and not ImageChops.difference(image, content).getbbox()
            )
    if not same:
        raise FileExistsError(f"{path} is another file than the one to write, expected none")
    return True


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:  # broken PNG files are a SyntaxError to Pillow
        raise ValueError(f"{path}: {error}, expected a complete image") from error
