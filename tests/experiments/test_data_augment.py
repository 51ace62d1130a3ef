from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.data.augment import crop_flip, normalize, random_crop_flip
from qt_jax.errors import InvalidInput


def padded_crop(image, top, left, flipped, pad):
    """Do the same in numpy the long way: pad, slice, mirror."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    crop = padded[top : top + height, left : left + width]
    return crop[:, ::-1] if flipped else crop


@given(
    shape=st.sampled_from([(8, 8, 1), (6, 9, 3)]),
    pad=st.sampled_from([0, 2, 5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_crop_flip_equals_padding_slicing_and_mirroring(shape, pad, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (5, *shape), dtype=np.uint8)
    offsets = rng.integers(0, 2 * pad + 1, (5, 2), dtype=np.int32)
    flips = rng.random(5) < 0.5
    expected = [
        padded_crop(image, top, left, flipped, pad)
        for image, (top, left), flipped in zip(images, offsets, flips, strict=True)
    ]
    got = crop_flip(jnp.asarray(images), jnp.asarray(offsets), jnp.asarray(flips), pad)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, np.stack(expected))


def all_crops(image, pad, flips):
    """Return every possible result for one image, as bytes, in a fixed order."""
    places = range(2 * pad + 1)
    return [
        padded_crop(image, top, left, flip, pad).tobytes()
        for top in places
        for left in places
        for flip in flips
    ]


@pytest.mark.parametrize("flips", [(False, True), (False,)])
def test_every_crop_is_as_likely_as_any_other(flips):
    n, pad = 4000, 1
    image = np.arange(36, dtype=np.uint8).reshape(4, 9, 1)
    images = jnp.broadcast_to(jnp.asarray(image), (n, *image.shape))
    out = np.asarray(
        jax.jit(partial(random_crop_flip, pad=pad, flip=len(flips) == 2))(jax.random.key(0), images)
    )
    kinds = all_crops(image, pad, flips)
    assert len(set(kinds)) == len(kinds) == 9 * len(flips)
    counts = np.bincount([kinds.index(crop.tobytes()) for crop in out], minlength=len(kinds))
    assert stats.chisquare(counts).pvalue > 0.01


def test_random_crop_flip_follows_its_key_and_compiles_once():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8))
    augment = jax.jit(chex.assert_max_traces(random_crop_flip, n=1))
    first, again, other = (np.asarray(augment(jax.random.key(seed), images)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.uint8 and first.shape == images.shape


@pytest.mark.parametrize("pad", [-1, 8])
def test_pad_beyond_the_image(pad):
    with pytest.raises(InvalidInput, match=f"pad {pad} does not suit images of 8x10: choose 0 to 7"):
        random_crop_flip(jax.random.key(0), jnp.zeros((1, 8, 10, 1), jnp.uint8), pad=pad)


def test_normalize_equals_float64():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    got = jax.jit(partial(normalize, mean=mean, std=std))(jnp.asarray(images))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (images.astype(np.float64) / 255 - mean) / std, atol=1e-6)


def test_normalize_refuses_what_is_normalised_already_or_of_other_channels():
    with pytest.raises(InvalidInput, match="takes uint8 images, got float32"):
        normalize(jnp.zeros((1, 2, 2, 1), jnp.float32), (0.5,), (0.5,))
    with pytest.raises(InvalidInput, match="images of 3 channels need 3 means and stds, got 1 and 1"):
        normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8), (0.5,), (0.5,))
