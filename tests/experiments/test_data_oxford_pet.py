"""Load Oxford-IIIT Pet from a tiny copy in the official layout, with the toy's checksums pinned."""

import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.data import load, oxford_pet
from experiments.data.store import CorruptData, Unavailable
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
TRAIN = ["Abyssinian_2", "Abyssinian_10", "beagle_1", "pug_7"]
TEST = ["Abyssinian_1", "pug_9"]
MODES = {"beagle_1": "L", "pug_9": "P"}


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def trimap(stem):
    """Draw rows of pet above background with a border between, of another height for each photograph."""
    height = 90 + len(stem)
    rows = np.repeat([1, 3, 2], [40, 10, height - 50]).astype(np.uint8)
    return np.broadcast_to(rows[:, None], (height, 120))


def photograph(stem):
    levels = RNG.integers(0, 256, (*trimap(stem).shape, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(MODES.get(stem, "RGB"))


@pytest.fixture
def files():
    """Return the content of the two archives, with the real ones' junk and unlisted photographs."""
    listing = {
        "trainval": "".join(f"{stem} 1 1 1\n" for stem in TRAIN),
        "test": "".join(f"{stem} 1 1 1\n" for stem in TEST),
    }
    annotations = {f"annotations/{name}.txt": text.encode() for name, text in listing.items()}
    annotations |= {"annotations/README": b"text", "annotations/trimaps/._pug_7.png": b"junk"}
    images = {"images/Abyssinian_34.jpg": b"GIF89a, broken", "images/pug_7.mat": b"matrix"}
    for stem in (*TRAIN, *TEST):
        annotations[f"annotations/trimaps/{stem}.png"] = encoded(Image.fromarray(trimap(stem)), "png")
        images[f"images/{stem}.jpg"] = encoded(photograph(stem), "gif" if MODES.get(stem) == "P" else "jpeg")
    return {"images": images, "annotations": annotations}


def write_archives(folder, files, monkeypatch):
    """Write the two .tar.gz into `folder`, and pin their checksums."""
    folder.mkdir(exist_ok=True)
    for name in ("IMAGES", "ANNOTATIONS"):
        part = getattr(oxford_pet, name)
        with tarfile.open(folder / part.file_name, "w:gz") as tar:
            for path, content in files[part.folder].items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        md5 = hashlib.md5((folder / part.file_name).read_bytes()).hexdigest()
        monkeypatch.setattr(oxford_pet, name, replace(part, md5=md5))
    return folder


def write_folders(folder, files):
    for path, content in (files["images"] | files["annotations"]).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    def refuse(url, md5, path):
        raise Unavailable("no route to host")

    monkeypatch.setattr(oxford_pet, "from_url", refuse)
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))


def expected_mask(stem, side):
    """Look up the centre of each pixel of the small mask in the trimap."""
    large = trimap(stem)
    rows = ((np.arange(side) + 0.5) * large.shape[0] / side).astype(int)
    columns = ((np.arange(side) + 0.5) * large.shape[1] / side).astype(int)
    return large[rows][:, columns] - 1


@pytest.mark.parametrize("packed", [True, False])
def test_local_copy(files, tmp_path, monkeypatch, packed):
    folder = tmp_path / "mine"
    if packed:
        write_archives(folder, files, monkeypatch)
    else:
        write_folders(folder, files)
    published = oxford_pet.load_oxford_pet(folder)
    assert published.train_images.shape == (4, 64, 64, 3) and published.test_images.shape == (2, 64, 64, 3)
    assert published.train_images.dtype == published.train_labels.dtype == np.uint8
    for stem, mask in zip((*TRAIN, *TEST), (*published.train_labels, *published.test_labels), strict=True):
        np.testing.assert_array_equal(mask, expected_mask(stem, 64))
    image = Image.open(io.BytesIO(files["images"]["images/beagle_1.jpg"])).convert("RGB")
    resized = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(published.train_images[2], resized)
    assert not (tmp_path / "cache").exists()


def test_larger_side_and_a_validation_split(files, tmp_path):
    data = load("oxford-pet-128", write_folders(tmp_path / "mine", files), validation_size=1)
    assert data.train_images.shape == (3, 128, 128, 3) and data.validation_labels.shape == (1, 128, 128)
    assert data.class_names == ("pet", "background", "border")
    np.testing.assert_array_equal(data.test_labels[1], expected_mask("pug_9", 128))


def test_fetched_once_then_cached(files, tmp_path, monkeypatch):
    source, fetched = write_archives(tmp_path / "host", files, monkeypatch), []

    def serve(url, md5, path):
        fetched.append(url)
        path.write_bytes((source / path.name).read_bytes())

    monkeypatch.setattr(oxford_pet, "from_url", serve)
    first, second = load("oxford-pet", validation_size=0), load("oxford-pet", validation_size=0)
    assert fetched == [oxford_pet.ADDRESS + name for name in ("images.tar.gz", "annotations.tar.gz")]
    np.testing.assert_array_equal(first.train_images, second.train_images)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["oxford-pet-64.npz"]

    path = tmp_path / "cache" / "oxford-pet-64.npz"
    path.write_bytes(path.read_bytes()[:-3000])
    np.testing.assert_array_equal(load("oxford-pet", validation_size=0).train_images, first.train_images)
    assert len(fetched) == 4


def test_flipped_bit_in_the_cache_is_noticed(files, tmp_path, monkeypatch, capsys):
    folder = write_archives(tmp_path / "host", files, monkeypatch)
    monkeypatch.setattr(
        oxford_pet, "from_url", lambda url, md5, path: path.write_bytes((folder / path.name).read_bytes())
    )
    whole = load("oxford-pet", validation_size=0)
    path = tmp_path / "cache" / "oxford-pet-64.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(load("oxford-pet", validation_size=0).train_images, whole.train_images)
    assert "Fetching it again" in capsys.readouterr().err


def test_when_it_cannot_be_had_the_error_names_every_way(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        load("oxford-pet")
    ways = (
        *("no route to host", oxford_pet.ADDRESS, "5c4f3ee8e5d25df40f4fd59a7f44e54c", "QT_JAX_DATA"),
        *("95a8c909bbe2e81eed6a22bccdf3f68f", "--data-dir", "images.tar.gz", "oxford-pet-64.npz", "composed"),
    )
    for words in ways:
        assert words in str(caught.value)
    with pytest.raises(
        InvalidInput, match=r"no Oxford-IIIT Pet annotations .* looked for annotations.tar.gz"
    ):
        load("oxford-pet", tmp_path)


def test_altered_archive(files, tmp_path, monkeypatch):
    folder = write_archives(tmp_path / "mine", files, monkeypatch)
    (folder / "images.tar.gz").write_bytes(b"other")
    with pytest.raises(CorruptData, match=r"images.tar.gz has MD5 .*, expected"):
        load("oxford-pet", folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("annotations/trimaps/pug_9.png", None, "annotations/trimaps/pug_9.png"),
        ("annotations/test.txt", None, "annotations/test.txt"),
        ("images/pug_9.jpg", None, "pug_9"),
        ("images/pug_9.jpg", b"no image", "pug_9.jpg of Oxford-IIIT Pet cannot be decoded"),
        (
            "annotations/trimaps/pug_9.png",
            encoded(Image.fromarray(np.full((9, 9), 7, np.uint8)), "png"),
            "pug_9 holds other values than 1, 2 and 3",
        ),
    ],
)
def test_incomplete_or_damaged_folder(files, tmp_path, name, content, says):
    folder = write_folders(tmp_path / "mine", files)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CorruptData, match=says):
        load("oxford-pet", folder)
