"""Say what a dataset holds, whether every document of it is whole, and show documents as the model sees them.

    python tools/inspect_dataset.py PREFIX [--check] [--decode] [--workers N] [--show DOCUMENT --tokenizer PATH]
    python tools/inspect_dataset.py PREFIX --html PAGE --tokenizer PATH [--documents 24] [--preset NAME] [--config FILE]

The page is one file, for any browser: the pieces that the run cuts each document into, every token in the colour of its
part in the loss, images as tiles by the run's own decoder, boxes and points on them. What the model sees depends on the
run: name it as for the trainer, single values as section.field=value (defaults otherwise).

Exit codes: 0 nothing is wrong; 1 --check found a document that is not whole; 2 the dataset cannot be opened.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm15_megatron.config.parse import ParsedRun, parse_run
from mm15_megatron.data.boxes import Scale
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.inspect import Integrity, check_documents, histograms
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import DataError, MM15Error
from mm15_megatron.presets import REGISTRY
from mm15_megatron.utils.progress import Progress

EXIT_DAMAGED, EXIT_BAD_INPUT = 1, 2


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefix", type=Path, help="of the dataset")
    parser.add_argument("--check", action="store_true", help="look at every document, and at the header of every image")
    parser.add_argument("--decode", action="store_true", help="with --check: decode every image too")
    parser.add_argument(
        "--max-image-pixels", type=int, default=64_000_000, help="larger images are a problem [64000000]"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [the cores]")
    parser.add_argument("--show", type=int, metavar="DOCUMENT", help="print one document")
    parser.add_argument("--tokenizer", type=Path, help="with --show and --html: the one that it was built with")
    page = parser.add_argument_group("--html")
    page.add_argument("--html", type=Path, metavar="PAGE", help="write a page of samples")
    page.add_argument(
        "--documents", default="24", metavar="N|LIST", help="how many, spread over all, or which: 3,5,10-19 or 7, [24]"
    )
    page.add_argument("--seed", type=int, default=0, help="of the spread [0]")
    page.add_argument("--pieces", type=int, default=8, help="of each document at most [8]")
    page.add_argument("--pictures", default="jpeg", help="jpeg, or png: every pixel, several times larger [jpeg]")
    page.add_argument("--scale", type=int, default=672, help="of coordinates in the text, as the dataset has it [672]")
    page.add_argument("--scale-each-side", action="store_true", help="each side is that long, not the longer one")
    page.add_argument("--preset", help="of the run, as the trainer takes it")
    page.add_argument("--config", action="append", default=[], metavar="FILE", help="of the run; may be repeated")
    page.add_argument("options", nargs="*", metavar="section.field=value", help="options of the run, behind PREFIX")
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


def run_of(given: argparse.Namespace) -> ParsedRun:
    """Read the run whose rules decide what the model sees."""
    preset = [] if given.preset is None else [f"--preset={given.preset}"]
    return parse_run([*preset, *(f"--config={file}" for file in given.config), *given.options], presets=REGISTRY)


def write_html(given: argparse.Namespace, documents: int) -> Iterator[str]:
    """Write the page of a dataset of that many documents, and yield what is on it."""
    from mm15_megatron.data.inspect_html import PageOptions, parse_documents, write_page  # imports torch

    run = run_of(given)
    path = given.tokenizer or run.config.data.tokenizer
    if not path:
        raise DataError("--html without a tokenizer", fix="give --tokenizer, the one that the dataset was built with")
    wanted = parse_documents(given.documents)
    count = min(wanted, documents) if isinstance(wanted, int) else len(wanted)
    progress = Progress(count, stream=sys.stderr, noun="document")
    account = write_page(
        given.html,
        given.prefix,
        tokenizer=Tokenizer(path),
        cfg=run.config,
        origins=run.origins,
        options=PageOptions(
            documents=None if isinstance(wanted, int) else wanted,
            count=count,
            seed=given.seed,
            max_pieces=given.pieces,
            scale=Scale(given.scale, each_side=given.scale_each_side),
            pictures=given.pictures,
        ),
        tell=lambda done, total: progress.update(done, "shown"),
    )
    progress.close()
    yield f"{given.html}: {account.documents} documents, {account.pieces} pieces, {account.broken} documents broken"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = arguments().parse_intermixed_args(argv)
    try:
        if given.html is None and (given.preset or given.config or given.options):
            raise DataError("a run is named without --html", fix="add --html PAGE, or leave out what names the run")
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
        if given.html is not None:
            print(*write_html(given, source.num_documents), sep="\n")
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
