"""Image-caption pairs, rendering ``captions-1``: image, caption, end of text (unpublished in MM1: our default)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mm15_megatron.data.build import DEFAULT_OPTIONS, BuildOptions, account, checked_images
from mm15_megatron.data.indexed.format import Manifest
from mm15_megatron.data.indexed.writer import DatasetWriter
from mm15_megatron.data.tokenizer import Tokenizer


def encode_caption(caption: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of one pair: image sentinel, caption, end of text."""
    return [tokenizer.image_id, *tokenizer.encode(caption), tokenizer.eos_id]


def build_captions(
    prefix: str | Path,
    pairs: Iterable[tuple[bytes, str]],
    tokenizer: Tokenizer,
    *,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Manifest:
    """Write an indexed dataset of kind ``captions``.

    Args:
        prefix: path prefix of the dataset.
        pairs: (encoded image bytes, caption).
        tokenizer: the tokenizer of the run.
        options: what to do with bad images and an existing dataset.

    Returns:
        The manifest; ``dropped`` counts the pairs left out, by reason.

    Raises:
        DataError: for an image that cannot be used (unless dropped), or a prefix that is taken.
    """
    with DatasetWriter(
        prefix,
        kind="captions",
        tokenizer_digest=tokenizer.digest,
        image_sentinel_id=tokenizer.image_id,
        overwrite=options.overwrite,
        meta=account(options),
    ) as writer:
        for number, (data, caption) in enumerate(pairs):
            images = checked_images([data], where=f"pair {number} of {prefix}", options=options)
            if images is None:
                writer.count_dropped({"bad image": 1})
            else:
                writer.add_document(encode_caption(caption, tokenizer), images=images)
    return writer.manifest
