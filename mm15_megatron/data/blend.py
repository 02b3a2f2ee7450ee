"""From the weights and epochs of the sources to the mixture that chooses rows or samples.

A source has weights or epochs, never both; what follows for the other is in :class:`Share`. Epochs become a share of
the run: epochs x units of an epoch / units of the run, where a unit is a row, or a sample where samples are mixed.
Weights of tokens become weights of rows, divided by the tokens a row of the source holds on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.data.batch_plan import units_of_step
from mm15_megatron.data.mixture import Mixture, Weights
from mm15_megatron.data.pieces import COUNTED
from mm15_megatron.errors import ConfigError


@dataclass(frozen=True)
class EpochSize:
    """What one epoch of a source holds after packing.

    Attributes:
        name: name of the source.
        documents: its documents.
        rows: rows of an epoch; 0 where rows are of mixed sources.
        samples: documents and pieces of them that are trained on.
        tokens: tokens in the rows, image slots included, padding not.
        image_slots: tokens that tiles own.
        images: images.
        tiles: tiles.
    """

    name: str
    documents: int
    rows: int
    samples: int
    tokens: int
    image_slots: int
    images: int
    tiles: int

    @classmethod
    def of(cls, name: str, line: np.ndarray[tuple[int], np.dtype[np.int64]]) -> EpochSize:
        """Read the sum of the lines of an epoch's chunks."""
        found = dict(zip((*COUNTED, "rows"), line.tolist(), strict=True))
        wanted = ("documents", "rows", "samples", "tokens", "image_slots", "images", "tiles")
        return cls(name, **{key: found[key] for key in wanted})

    def scaled(self, documents: int) -> EpochSize:
        """Return the size of an epoch of ``documents`` documents that are like these."""
        names = ("rows", "samples", "tokens", "image_slots", "images", "tiles")
        values = {name: round(vars(self)[name] * documents / self.documents) for name in names}
        return EpochSize(self.name, documents, **values)

    def units(self, *, by_sample: bool) -> int:
        """Rows of an epoch, or samples."""
        return self.samples if by_sample else self.rows


@dataclass(frozen=True)
class Share:
    """What a source contributes to a run.

    Attributes:
        name: name of the source.
        given: ``weight 2`` or ``epochs 3``, as the configuration says.
        units: rows or samples of the run that are of this source.
        epochs: how often each of its documents is seen.
        row_share: share of the rows (of mixed rows: by the tokens, since one row holds several sources).
        sample_share: share of the samples.
        token_share: share of the tokens that are not padding.
    """

    name: str
    given: str
    units: int
    epochs: float
    row_share: float
    sample_share: float
    token_share: float

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.name}: {self.given} = {self.epochs:.3g} epochs; {self.row_share:.1%} of rows, "
            f"{self.sample_share:.1%} of samples, {self.token_share:.1%} of tokens"
        )


def needs_epoch_sizes(cfg: RunConfig, *, sources: Sequence[SourceConfig]) -> bool:
    """Tell whether the mixture rests on what whole epochs hold, so that these must be packed before the first row."""
    return cfg.data.mixture_unit == "token" or any(source.epochs is not None for source in sources)


def run_units(cfg: RunConfig) -> int:
    """Return the rows (or samples, ``data.batch_unit``) that the run consumes in ``train.steps`` steps."""
    consumed = 0
    ramp = cfg.train.rampup_batch_size
    if ramp is None:
        return cfg.train.steps * cfg.train.global_batch_size
    for step in range(cfg.train.steps):
        if consumed >= ramp[2]:
            return consumed + (cfg.train.steps - step) * cfg.train.global_batch_size
        consumed += units_of_step(consumed, global_batch_size=cfg.train.global_batch_size, rampup=ramp)
    return consumed


def build_mixture(
    cfg: RunConfig, *, sources: Sequence[SourceConfig], sizes: Sequence[EpochSize] | None, seed: int
) -> Mixture:
    """Return the mixture of a run.

    Args:
        cfg: the run.
        sources: its sources, in order.
        sizes: what an epoch of each holds; None only if :func:`needs_epoch_sizes` says no.
        seed: seeds the starting point.

    Raises:
        ConfigError: the epochs asked for do not fit the length of the run.
    """
    firsts = sorted({0, *(change.first for source in sources for change in source.changes)})
    fixed = _epoch_shares(cfg, sources, sizes)
    return Mixture([Weights(first, _values(cfg, sources, sizes, fixed, first)) for first in firsts], seed=seed)


def _values(
    cfg: RunConfig,
    sources: Sequence[SourceConfig],
    sizes: Sequence[EpochSize] | None,
    fixed: Sequence[float | None],
    first: int,
) -> tuple[float, ...]:
    """Return the shares from unit ``first`` on."""
    weights = np.array(
        [0.0 if share is not None else _weight(s, first) for s, share in zip(sources, fixed, strict=True)]
    )
    if cfg.data.mixture_unit == "token":
        assert sizes is not None
        weights /= [size.tokens / size.rows for size in sizes]
    rest = max(0.0, 1.0 - math.fsum(share for share in fixed if share is not None))
    total = math.fsum(weights)
    if all(share is not None for share in fixed):
        return tuple(share or 0.0 for share in fixed)
    if total <= 0:
        unit = "sample" if cfg.data.mixture_unit == "sample" else "row"
        raise ConfigError(
            f"from {unit} {first} on no source has a weight above 0",
            fix="give at least one source a weight there",
        )
    return tuple(
        weight / total * rest if share is None else share for weight, share in zip(weights.tolist(), fixed, strict=True)
    )


def _weight(source: SourceConfig, first: int) -> float:
    """Return the weight that holds from unit ``first`` on."""
    weight = 1.0 if source.weight is None else source.weight
    for change in source.changes:
        if change.first <= first:
            weight = change.weight
    return weight


def _epoch_shares(
    cfg: RunConfig, sources: Sequence[SourceConfig], sizes: Sequence[EpochSize] | None
) -> list[float | None]:
    """Return the share of the run of each source that asks for epochs; None for those with weights."""
    if all(source.epochs is None for source in sources):
        return [None] * len(sources)
    assert sizes is not None
    by_sample = cfg.data.mixture_unit == "sample"
    unit, total = ("samples" if by_sample else "rows"), run_units(cfg)
    if by_sample and cfg.data.batch_unit == "rows":
        raise ConfigError(
            "epochs of sources cannot be shared out in a run whose length is counted in rows of mixed sources",
            fix="set data.batch_unit=samples, or data.mixture_unit=row, or give weights",
        )
    wanted = [
        None if source.epochs is None else source.epochs * size.units(by_sample=by_sample)
        for source, size in zip(sources, sizes, strict=True)
    ]
    asked = math.fsum(units for units in wanted if units is not None)
    only_epochs = all(units is not None for units in wanted)
    if (asked >= total and not only_epochs) or (only_epochs and total > math.ceil(asked)):
        steps = int(asked) // cfg.train.global_batch_size
        raise ConfigError(
            f"the epochs of the sources are {asked:.0f} {unit}, and train.steps = {cfg.train.steps} takes {total}",
            fix=f"set train.steps to {steps}" + (" or less" if only_epochs else " or more, or ask for fewer epochs"),
        )
    return [None if units is None else units / (asked if only_epochs else total) for units in wanted]


def shares(
    cfg: RunConfig, mixture: Mixture, *, sources: Sequence[SourceConfig], sizes: Sequence[EpochSize]
) -> list[Share]:
    """Return what each source contributes to the whole run, in every unit."""
    by_sample = cfg.data.mixture_unit == "sample"
    counts = _run_counts(cfg, mixture, sizes, by_sample=by_sample).astype(np.float64)
    per_unit = np.array([1 / max(1, size.units(by_sample=by_sample)) for size in sizes])
    epochs = counts * per_unit
    samples = epochs * [size.samples for size in sizes]
    tokens = epochs * [size.tokens for size in sizes]
    rows = tokens if by_sample else counts
    return [
        Share(
            name=size.name,
            given=f"weight {_weight(source, 0):g}" if source.epochs is None else f"epochs {source.epochs:g}",
            units=int(counts[i]),
            epochs=float(epochs[i]),
            row_share=float(rows[i] / rows.sum()),
            sample_share=float(samples[i] / samples.sum()),
            token_share=float(tokens[i] / tokens.sum()),
        )
        for i, (source, size) in enumerate(zip(sources, sizes, strict=True))
    ]


def _run_counts(
    cfg: RunConfig, mixture: Mixture, sizes: Sequence[EpochSize], *, by_sample: bool
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return how often each source is chosen in the run.

    Where samples are mixed in rows, the samples of the run follow from the tokens that rows hold: full ones, nearly.
    """
    total = run_units(cfg)
    if not by_sample or cfg.data.batch_unit == "samples":
        return mixture.count_before(total)
    mean_tokens = np.array([size.tokens / max(1, size.samples) for size in sizes])
    low, high = 0, total * cfg.data.seq_length
    while low < high:  # the samples whose tokens fill the rows
        middle = (low + high) // 2
        if (mixture.count_before(middle) * mean_tokens).sum() < total * cfg.data.seq_length:
            low = middle + 1
        else:
            high = middle
    return mixture.count_before(low)
