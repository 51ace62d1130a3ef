"""Load Oxford-IIIT Pet with its trimaps (Parkhi, Vedaldi, Zisserman, Jawahar, Cats and Dogs, CVPR 2012)."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.dataset import PublishedSet
from experiments.data.store import (
    Arrays,
    CorruptData,
    as_arrays,
    cache_dir,
    cached,
    check_file,
    find_local,
    first_available,
    from_url,
)


@dataclass(frozen=True)
class Part:
    """Describe one of the two official archives: its file, its MD5, and the folder that it unpacks to."""

    file_name: str
    md5: str
    folder: str


ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
IMAGES = Part("images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "images")
ANNOTATIONS = Part("annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", "annotations")
LISTS = ("annotations/trainval.txt", "annotations/test.txt")
TRIMAPS = "annotations/trimaps/"
CLASS_NAMES = ("pet", "background", "border")
"""Trimap values 1, 2 and 3, in this order."""


def load_oxford_pet(data_dir: Path | None = None, side: int = 64) -> PublishedSet:
    """Load 3,680 + 3,669 RGB photographs of 37 breeds, with pet, background or border for every pixel.

    Photographs are resized to `side` x `side` (bilinear, antialiased, the aspect ratio is not kept). Trimaps
    are resized by the nearest pixel. Labels are uint8 (n, side, side).

    Without `data_dir` the resized arrays come from the cache, else from the official archives. There is no
    second source. The MD5s of the archives are checked. The arrays have no checksum, because JPEG decoders
    differ by a level.

    Args:
        data_dir: Folder with the official images.tar.gz and annotations.tar.gz, or with the folders that
            they unpack to, images and annotations.
        side: Height and width in pixels.

    Raises:
        InvalidInput: `data_dir` holds nothing usable, a file there is damaged, or the set cannot be fetched.
    """
    if data_dir is None:
        arrays = cached(f"oxford-pet-{side}", None, lambda scratch: _fetch(scratch, side))
    else:
        arrays = _from_folder(Path(data_dir).expanduser(), side)
    return PublishedSet(
        **arrays, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), class_names=CLASS_NAMES
    )


def _fetch(scratch: Path, side: int) -> Arrays:
    def official() -> Arrays:
        for part in (IMAGES, ANNOTATIONS):
            from_url(ADDRESS + part.file_name, part.md5, scratch / part.file_name)
        return _from_folder(scratch, side)

    advice = (
        f"Or point data_dir (--data-dir) at a folder that holds {IMAGES.file_name} (MD5 {IMAGES.md5}) and "
        f"{ANNOTATIONS.file_name} (MD5 {ANNOTATIONS.md5}), or what they unpack to, {IMAGES.folder} and "
        f"{ANNOTATIONS.folder}; or bring oxford-pet-{side}.npz from another cache. The cache is "
        f"{cache_dir()}; QT_JAX_DATA moves it. `--dataset composed` needs none of this."
    )
    way = f"official archives {ADDRESS}{IMAGES.file_name} and {ANNOTATIONS.file_name}"
    return first_available("Oxford-IIIT Pet", {way: official}, advice)


def _from_folder(folder: Path, side: int) -> Arrays:
    """Read the set from the two archives, or the two unpacked folders, that `folder` holds."""
    annotations = {
        name: content
        for name, content in _files(folder, ANNOTATIONS)
        if name in LISTS or name.startswith(TRIMAPS)
    }
    try:
        lists = [[line.split()[0] for line in annotations[name].decode().splitlines()] for name in LISTS]
        wanted = set().union(*lists)
        masks = {stem: _mask(annotations[f"{TRIMAPS}{stem}.png"], stem, side) for stem in wanted}
        images = {
            Path(name).stem: _photograph(content, name, side)
            for name, content in _files(folder, IMAGES)
            if Path(name).stem in wanted and name.endswith(".jpg")
        }
        columns = [np.stack([kept[stem] for stem in stems]) for stems in lists for kept in (images, masks)]
    except KeyError as error:
        raise CorruptData(
            f"the Oxford-IIIT Pet in {folder} has no {error.args[0]}, which it should; supply a complete copy"
        ) from error
    return as_arrays(*columns)


def _files(folder: Path, part: Part) -> Iterator[tuple[str, bytes]]:
    """Yield the name inside the archive and the content of every file of a part.

    Where the part is packed, its checksum is checked first.
    """
    path = find_local(folder, (part.file_name, part.folder), f"Oxford-IIIT Pet {part.folder}")
    if path.is_dir():
        for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
            yield file.relative_to(path.parent).as_posix(), file.read_bytes()
        return
    check_file(path, "md5", part.md5)
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member).read()


def _photograph(content: bytes, name: str, side: int) -> np.ndarray:
    """Decode and resize a photograph: uint8 (side, side, 3)."""
    return np.asarray(_open(content, name).convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def _mask(content: bytes, name: str, side: int) -> np.ndarray:
    """Return the classes 0, 1, 2 of a trimap that holds 1, 2, 3: uint8 (side, side)."""
    trimap = np.asarray(_open(content, name).resize((side, side), Image.Resampling.NEAREST))
    if trimap.ndim != 2 or trimap.min() < 1 or trimap.max() > len(CLASS_NAMES):
        raise CorruptData(f"the trimap of {name} holds other values than 1, 2 and 3; supply a fresh copy")
    return trimap.astype(np.uint8) - np.uint8(1)


def _open(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except OSError as error:
        raise CorruptData(
            f"{name} of Oxford-IIIT Pet cannot be decoded ({error}); supply a fresh copy"
        ) from error
    return image
