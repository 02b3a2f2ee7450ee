"""The dry run of the data: what a run would read, how often, and how full its rows would be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.blend import EpochSize, Share, run_units
from mm15_megatron.data.open_order import OpenOrder, Tell, open_order, plan_folder, run_shares
from mm15_megatron.data.packing import PackingRules, least_rows

_STEPS_LOOKED_AT = 16


def plan_text(cfg: RunConfig, *, tell: Tell) -> str:
    """Pack an epoch of every source, write the tables of ``data.plan_dir``, and return the plan as lines of text.

    Args:
        cfg: the run.
        tell: takes chunks packed, all chunks, and the source they are of.

    Raises:
        ConfigError: if there is no source, or the epochs asked for do not fit the length of the run.
        DataError: if a tokenizer or a dataset is missing, damaged, or does not belong to the run.
    """
    opened = open_order(cfg, writes=True, chunks_of_epoch=tell)
    order = opened.order
    sizes = [EpochSize.of(source.name, source.table.before(source.chunks)) for source in order.sources]
    shares = run_shares(cfg, order)
    unit = "samples" if cfg.data.batch_unit == "samples" else "rows"
    rows = [_EPOCH_HEADS, *(_epoch_cells(opened, number, size) for number, size in enumerate(sizes))]
    run = [_RUN_HEADS, *(_run_cells(share) for share in shares)]
    sections = [
        f"plan of {cfg.train.steps:,} steps, {run_units(cfg):,} {unit} of training, order {order.digest[:12]}",
        "an epoch of each source",
        *_table(rows),
        "the run",
        *_table(run),
        *_lost(opened),
    ]
    if unit == "samples":
        sections.append(_rows_of_steps(cfg, opened))
    elif cfg.data.mixture_unit == "sample":
        sections.append(_mixed_rows(opened))
    disk = sum(_bytes(opened, number) for number in range(len(sizes)))
    sections.append(f"{disk / 1e9:,.3f} GB of datasets; tables in {plan_folder(cfg)}")
    return "\n".join(sections) + "\n"


_EPOCH_HEADS = (
    "source", "kind", "documents", "samples", "rows", "text tokens", "image tokens", "fill", "of bound", "GB",
)  # fmt: skip
_RUN_HEADS = ("source", "given", "epochs", "of rows", "of samples", "of tokens")


def _epoch_cells(opened: OpenOrder, number: int, size: EpochSize) -> tuple[str, ...]:
    rules = opened.rules
    fill = of_bound = "-"  # rows of mixed sources are no source's
    if size.rows:
        fill = f"{size.tokens / (size.rows * rules.seq_length):.1%}"
        of_bound = f"{_bound(size, rules) / size.rows:.1%}"
    return (
        size.name,
        opened.readers[number].kind,
        f"{size.documents:,}",
        f"{size.samples:,}",
        f"{size.rows:,}" if size.rows else "-",
        f"{size.tokens - size.image_slots:,}",
        f"{size.image_slots:,}",
        fill,
        of_bound,
        f"{_bytes(opened, number) / 1e9:,.3f}",
    )


def _bound(size: EpochSize, rules: PackingRules) -> float:
    """Rows that the cap that binds most needs at least."""
    needed = np.array([size.tokens, size.images, size.tiles, size.samples]) / rules.caps_C
    return float(needed.max())


def _run_cells(share: Share) -> tuple[str, ...]:
    parts = (share.row_share, share.sample_share, share.token_share)
    return (share.name, share.given, f"{share.epochs:,.3f}", *(f"{part:.2%}" for part in parts))


def _lost(opened: OpenOrder) -> list[str]:
    reports = [source.counts(source.table.before(source.chunks)) for source in opened.order.sources]
    return [f"left out in an epoch: {report}" for report in reports if report.loses]


def _rows_of_steps(cfg: RunConfig, opened: OpenOrder) -> str:
    size = cfg.train.global_batch_size
    first = cfg.train.rampup_batch_size[2] if cfg.train.rampup_batch_size else 0  # behind the ramp
    counts = [len(opened.order.step(first + step * size, size).tasks) for step in range(_STEPS_LOOKED_AT)]
    return (
        f"a step of {size} samples takes {np.mean(counts):.1f} rows ({min(counts)} to {max(counts)} in "
        f"{len(counts)} steps), filled up with empty ones for the ranks"
    )


def _mixed_rows(opened: OpenOrder) -> str:
    rows, sizes = opened.order.mixed_sizes()
    fill, of_bound = sizes.tokens.sum() / (rows * opened.rules.seq_length), least_rows(sizes, opened.rules) / rows
    return (
        f"rows of mixed sources: fill {fill:.1%}, {of_bound:.1%} of the bound (the first {len(sizes):,} samples, "
        f"{rows:,} rows)"
    )


def _bytes(opened: OpenOrder, number: int) -> int:
    return sum(record.bytes for record in opened.readers[number].manifest.files.values())


def _table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join((name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))))
        for name, *cells in lines
    ]
