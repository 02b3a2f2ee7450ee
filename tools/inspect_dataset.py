"""Say what a dataset holds, and whether every document of it is whole.

    python tools/inspect_dataset.py PREFIX [--check] [--decode] [--workers N] [--show DOCUMENT --tokenizer PATH]

Exit codes: 0 nothing is wrong; 1 --check found a document that is not whole; 2 the dataset cannot be opened.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.inspect import Integrity, check_documents, histograms
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import MM15Error
from mm15_megatron.utils.progress import Progress

EXIT_DAMAGED, EXIT_BAD_INPUT = 1, 2


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, help="of the dataset")
    parser.add_argument("--check", action="store_true", help="look at every document, and at the header of every image")
    parser.add_argument("--decode", action="store_true", help="with --check: decode every image too")
    parser.add_argument(
        "--max-image-pixels", type=int, default=64_000_000, help="larger images are a problem [64000000]"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [the cores]")
    parser.add_argument("--show", type=int, metavar="DOCUMENT", help="print one document")
    parser.add_argument("--tokenizer", type=Path, help="with --show: the tokenizer that it was built with")
    return parser


def facts(source: IndexedSource) -> Iterator[str]:
    """Yield what the manifest and the index say."""
    found = source.manifest
    size = sum(record.bytes for record in found.files.values())
    yield f"{source.prefix}: {found.kind}, rendering {found.rendering}, tokenizer {found.tokenizer_digest[:12]}"
    yield f"{found.documents:,} documents, {found.tokens:,} tokens, {found.images:,} images, {size / 2**30:.3f} GiB"
    for reason, count in sorted(found.dropped.items(), key=lambda item: -item[1]):
        yield f"left out when it was built: {count:,} x {reason}"
    for histogram in histograms(source):
        yield from histogram.lines()


def document(source: IndexedSource, number: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield one document: its text with targets in brackets, and its images."""
    if not 0 <= number < source.num_documents:
        raise SystemExit(f"--show {number}: the documents are 0 to {source.num_documents - 1}")
    tokens, mask = source.tokens(number), source.loss_mask(number)
    edges = [0, *(i for i in range(1, len(tokens)) if mask[i] != mask[i - 1]), len(tokens)]
    for first, stop in zip(edges[:-1], edges[1:], strict=True):
        text = visible(tokens[first:stop].tolist(), tokenizer)
        yield f"[{text}]" if mask[first] else text
    for item in range(int(source.image_index[number]), int(source.image_index[number + 1])):
        height, width = (int(side) for side in source.image_sizes[item])
        yield f"image {item}: {height} x {width}, {len(source.image_bytes(item)):,} bytes"


def visible(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of ids, images and ends of text included."""
    marks = {tokenizer.image_id: "<image>", tokenizer.eos_id: "</s>"}
    pieces: list[str] = []
    run: list[int] = []
    for token in tokens:
        if token in marks:
            pieces += [tokenizer.decode(run)] * bool(run) + [marks[token]]
            run = []
        else:
            run.append(token)
    return "".join([*pieces, tokenizer.decode(run) if run else ""])


def integrity(found: Integrity) -> Iterator[str]:
    """Yield what the check found."""
    yield f"{found.documents:,} documents checked, {sum(found.problems.values()):,} problems"
    for problem, count in found.problems.most_common():
        yield f"  {count:,} x {problem}"
    yield from (f"    {example}" for example in found.examples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = arguments().parse_args(argv)
    try:
        source = IndexedSource(given.prefix)
        print(*facts(source), sep="\n")
        if given.show is not None:
            if given.tokenizer is None:
                raise SystemExit("--show needs --tokenizer")
            tokenizer = Tokenizer(given.tokenizer)
            print(
                *document(IndexedSource(given.prefix, tokenizer_digest=tokenizer.digest), given.show, tokenizer),
                sep="\n",
            )
        if not given.check:
            return 0
        progress = Progress(source.num_documents, stream=sys.stderr, noun="document")
        found = check_documents(
            given.prefix,
            workers=given.workers,
            decode=given.decode,
            max_image_pixels=given.max_image_pixels,
            tell=lambda done, total: progress.update(done, "checked"),
        )
        progress.close()
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(*integrity(found), sep="\n")
    return EXIT_DAMAGED if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
