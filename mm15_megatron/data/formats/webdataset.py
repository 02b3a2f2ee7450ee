"""Caption shards: tars as img2dataset writes them with ``output_format=webdataset``, and plain WebDataset shards.

Sources: img2dataset's README and its ``img2dataset/writer.py`` and ``downloader.py``; the grouping by name in
``webdataset/tariterators.py`` and the order of members in ``webdataset/writer.py``. A sample is ``<key>.jpg``
(``.png``, ``.webp``: the option encode_format), ``<key>.json`` and, where captions are saved, ``<key>.txt``, in the
order of their names. The JSON holds url, caption, key, status, error_message, width, height, original_width,
original_height, exif and sha256 (md5 before), and further columns of the user's list. img2dataset writes successes
alone into the tar: failed downloads stand in the ``.parquet`` beside it, which is not read here but by the format
``img2dataset``; a sample whose status is not ``success`` (from another tool, or joined by hand) is left out and counted
by its status.

Not confirmed: which statuses other tools write; all but those of img2dataset are counted under one reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.formats.base import Caption, Found, Skipped, Unit, input_files
from mm15_megatron.data.formats.fields import RAISE, SKIP, check_choice, check_named, fault_of, status_fault, text_field
from mm15_megatron.data.formats.tar_samples import TOO_LARGE, Sample, TarCut, check_limit, samples
from mm15_megatron.errors import DataError

IMAGE_SUFFIXES: Final = ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff")
NO_IMAGE: Final = "no image"
NO_CAPTION: Final = "no caption"
TRUNCATED: Final = "truncated shard"


@dataclass(frozen=True)
class WebDatasetCaptions:
    """Reader of caption shards; a unit is one tar. Captions lose the white space around them.

    Attributes:
        paths: tars, or folders of them.
        caption_field: take the caption from this field of the ``.json`` (a synthetic caption); None = from the text.
        caption_suffix: suffix of the member that holds the caption.
        image_suffixes: suffixes of members that are images.
        max_member_bytes: a sample with a larger member is left out and counted.
        truncated: ``raise``, or ``skip``: of a tar without end marker (a job that was killed) keep what can be read,
            and count one document as left out.
    """

    paths: tuple[Path, ...]
    caption_field: str | None = None
    caption_suffix: str = "txt"
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    max_member_bytes: int = 2**28
    truncated: str = RAISE

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_choice("truncated", self.truncated, (RAISE, SKIP))
        check_limit(self.max_member_bytes)
        check_named(caption_suffix=self.caption_suffix)
        if self.caption_field is not None:
            check_named(caption_field=self.caption_field)
        suffixes = (*self.image_suffixes, self.caption_suffix, "json")
        if not self.image_suffixes or len(set(suffixes)) < len(suffixes):
            raise DataError(f"the suffixes are {', '.join(suffixes)}", fix="name image suffixes, and each suffix once")
        if any(suffix != suffix.lower() or suffix.startswith(".") for suffix in suffixes):
            raise DataError(f"the suffixes are {', '.join(suffixes)}", fix="write them in lower case, without dot")

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "captions"

    def units(self) -> tuple[Unit, ...]:
        """One unit a tar.

        Raises:
            DataError: there is none.
        """
        return tuple(Unit(path) for path in input_files(self.paths, endings=(".tar",)))

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read one tar.

        Raises:
            DataError: it is not a tar, is broken or truncated, its samples are torn apart, or a ``.json`` is not JSON
                or lacks ``caption_field``.
        """
        wanted = {*self.image_suffixes, self.caption_suffix, "json"}
        torn: set[str] = set()
        try:
            for sample in samples(unit.path, wanted=wanted.__contains__, largest=self.max_member_bytes):
                if sample.key in torn:
                    raise DataError(
                        f"{unit.path}: members of sample {sample.key!r} do not stand together",
                        fix="write the tar again with its members sorted by name",
                    )
                outcome = self.outcome(sample, path=unit.path)
                if isinstance(outcome, Skipped) and outcome.reason in (NO_IMAGE, NO_CAPTION, TOO_LARGE):
                    torn.add(sample.key)
                if sample.whole or isinstance(outcome, Found):  # else it is the one that the cut leaves out
                    yield outcome
        except TarCut as cut:
            if self.truncated == RAISE:
                raise cut.error(unit.path, fix=f"download it again, or let truncated be {SKIP!r}") from cut
            yield Skipped(TRUNCATED, unit.path.name)

    def outcome(self, sample: Sample, *, path: Path) -> Found | Skipped:
        """Return what becomes of a sample of ``path``.

        Raises:
            DataError: its ``.json`` is not JSON or lacks ``caption_field``.
        """
        where = f"{path.name}:{sample.key}"
        if sample.too_large:
            return Skipped(TOO_LARGE, where)
        metadata = _metadata(sample, place=f"{path}: {sample.key}.json")
        failed = status_fault(metadata.get("status")) if metadata else None
        if failed is not None:
            return Skipped(failed, where)
        images = [data for suffix, data in sample.files.items() if suffix in self.image_suffixes]
        if len(images) != 1:
            return Skipped("several images" if images else NO_IMAGE, where)
        if self.caption_field is not None:
            field, place = self.caption_field, f"{path}: {sample.key}.json"
            text = text_field(metadata, field, place=place) if metadata is not None else None
        else:
            try:
                raw = sample.files.get(self.caption_suffix)
                text = None if raw is None else raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                return Skipped("caption is not Unicode", where)
        reason = fault_of(text, noun="caption")
        if text is None or reason is not None:
            return Skipped(reason or NO_CAPTION, where)
        return Found(Caption(images[0], text.strip()), where)


def _metadata(sample: Sample, *, place: str) -> dict[str, Any] | None:
    if "json" not in sample.files:
        return None
    try:
        value = json.loads(sample.files["json"])
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", fix="write the shard again") from error
    if not isinstance(value, dict):
        raise DataError(f"{place} holds a {type(value).__name__}, not an object", fix="write one JSON object a sample")
    return value
