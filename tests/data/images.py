"""Real encoded images made in memory."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode_image(pixels: np.ndarray, *, form: str = "PNG", **options: object) -> bytes:
    """Encode a uint8 [H, W, 3] or [H, W] array."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def photo(height: int, width: int, *, seed: int = 0, form: str = "PNG", **options: object) -> bytes:
    """A smooth colourful picture with a little noise, encoded."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * ((1 + c) * x + (3 - c) * y) + seed) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    pixels = (127 + 90 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    return encode_image(pixels, form=form, **options)
