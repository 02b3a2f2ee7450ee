"""One dataset out of several that were built alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.data.indexed.format import Manifest
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter
from mm15_megatron.errors import DataError


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> Manifest:
    """Write the documents of ``prefixes``, in this order, as one dataset; bytes are copied, nothing is decoded.

    Raises:
        DataError: nothing is named, two of them hold the same documents, they are of different kinds, tokenizers or
            renderings, one is damaged, or ``output`` is taken or one of them.
    """
    sources = [IndexedSource(prefix) for prefix in prefixes]
    if not sources:
        raise DataError("no dataset to merge", fix="name one prefix or more")
    contents: dict[str, Path] = {}
    for source in sources:
        same = contents.setdefault(source.manifest.digest, source.prefix)
        if same is not source.prefix:
            raise DataError(
                f"{same} and {source.prefix} hold the same documents", fix="name each dataset once; weights repeat one"
            )
    if any(source.prefix.resolve() == Path(output).resolve() for source in sources):
        raise DataError(f"{output} is one of the datasets that are merged", fix="write to another prefix")
    first = sources[0].manifest
    with DatasetWriter(
        output,
        kind=first.kind,
        tokenizer_digest=first.tokenizer_digest,
        image_sentinel_id=first.image_sentinel_id,
        rendering=first.rendering,
        overwrite=overwrite,
        meta={"merged": [str(source.prefix) for source in sources]},
    ) as writer:
        for source in sources:
            writer.add_dataset(source)
    return writer.manifest
