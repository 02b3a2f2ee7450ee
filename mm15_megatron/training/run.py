"""Everything a run needs, built in one order: topology, seeds, resume decision, data, model, optimizer, writers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from megatron.core.distributed import DistributedDataParallel

from mm15_megatron.batch import MMBatch, RowRecord, SampleRecord
from mm15_megatron.checkpoint.start import start_from
from mm15_megatron.checkpoint.store import load_training
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.ledger import Ledger, ledger_text
from mm15_megatron.data.loader import Loader, build_loader
from mm15_megatron.data.open_order import OpenOrder, open_order, run_shares, write_tables
from mm15_megatron.data.samples import SampleRef
from mm15_megatron.models.backend import open_tensor_parallel_buffers
from mm15_megatron.models.build import build_chunks, check_replicas
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.resume import check_same_data, choose_checkpoint, choose_start, resume_block
from mm15_megatron.training.saver import Saver
from mm15_megatron.training.startup import peak_tflops, startup_screen
from mm15_megatron.training.state import TrainState
from mm15_megatron.training.step import StepParts
from mm15_megatron.training.watchdog import Watchdog
from mm15_megatron.utils.metrics import MetricsWriter
from mm15_megatron.utils.progress import Progress
from mm15_megatron.utils.ranks import on_rank_zero

_ROWS_TOLD: Final = 8
_SAMPLES_TOLD: Final = 32


@dataclass
class Feed:
    """The loader of this rank, remembering what the micro-batches of the current step were made of."""

    loader: Loader
    watchdog: Watchdog
    held_out: OpenOrder | None = None
    rows: list[RowRecord] = field(default_factory=list)

    def __iter__(self) -> Iterator[MMBatch]:
        """Return itself."""
        return self

    def __next__(self) -> MMBatch:
        """Return the next micro-batch and note its rows."""
        self.watchdog.enter("data")
        batch = next(self.loader)
        self.rows += batch.rows
        self.watchdog.enter("forward and backward")
        return batch

    def text(self) -> str:
        """Say what the step's micro-batches were made of so far, and what the next one is (any thread may ask)."""
        names = [source.name for source in self.loader.order.sources]
        taken = [
            f"row {row.row}: {_documents(row.samples, names)} ({row.text_tokens} text tokens, {row.image_slots} image "
            f"slots, {sum(sample.images for sample in row.samples)} images)"
            for row in self.rows[-_ROWS_TOLD:]
        ]
        coming = [f"row {row.row}: {_documents(row.samples, names)}" for row in self.loader.upcoming[:_ROWS_TOLD]]
        return f"took {'; '.join(taken) or 'nothing'}; next {'; '.join(coming) or 'unknown'}"


def _documents(samples: Sequence[SampleRecord | SampleRef], names: Sequence[str]) -> str:
    told = [f"{names[sample.source]} {sample.document}" for sample in samples[:_SAMPLES_TOLD]]
    rest = len(samples) - len(told)
    return ", ".join(told) + (f" and {rest} more" if rest else "") or "no sample"


@dataclass
class Run:
    """A run between two steps.

    Attributes:
        cfg: the configuration.
        parts: model, optimizer and groups.
        feed: this rank's micro-batches.
        state: where the run stands.
        peak: dense peak of one device, TFLOP/s; None = unknown.
        progress: what a person sees (rank 0).
        writer: TensorBoard and JSONL (rank 0 alone).
        saver: writes checkpoints.
        watchdog: hears what this rank does.
    """

    cfg: RunConfig
    parts: StepParts
    feed: Feed
    state: TrainState
    peak: float | None
    progress: Progress
    writer: MetricsWriter | None
    saver: Saver
    watchdog: Watchdog

    @property
    def topology(self) -> Topology:
        """Groups and ranks."""
        return self.parts.topology

    @classmethod
    def build(cls, cfg: RunConfig, *, origins: Mapping[str, str], place: Rendezvous, stack: ExitStack) -> Run:
        """Build everything, in the order that lets each part fail before the next one costs time.

        Data that are missing or are not the checkpoint's are found before a weight exists or a tensor is read.

        Args:
            cfg: a validated configuration.
            origins: where each option came from.
            place: what the launcher said.
            stack: closes what was opened, also when the build fails half-way.

        Raises:
            MM15Error: a device, a dataset, a checkpoint or an option cannot be used.
        """
        torch.set_num_threads(cfg.train.threads_per_rank or _fair_threads(place))
        stack.callback(close_topology)
        topology = build_topology(cfg.parallel, place=place)
        seed_everything(cfg.train.seed, topology=topology)
        checkpoint = on_rank_zero(lambda: choose_checkpoint(cfg))
        source = on_rank_zero(lambda: choose_start(cfg, checkpoint))
        stored = None if checkpoint is None else TrainState.from_dict(checkpoint.progress)
        on_rank_zero(lambda: write_tables(cfg))
        loader = build_loader(cfg, view=topology.view, consumed=stored.consumed if stored else 0)
        stack.callback(loader.close)
        if checkpoint is not None:
            check_same_data(checkpoint, cfg, order=loader.order)
        state = _with_ledger(stored, loader)
        held_out = open_order(cfg, validation=True) if cfg.train.validation_interval else None
        if cfg.parallel.tp_comm_overlap:
            stack.callback(open_tensor_parallel_buffers(cfg))
        parts = _build_parts(cfg, topology)
        if parts.graphs is not None:
            stack.callback(parts.graphs.close)
        checked = 0 if checkpoint is None else load_training(checkpoint, cfg, parts.chunks, parts.optimizer)
        start = None if source is None else start_from(source, cfg, parts.chunks, parts.optimizer)
        ranks = place.world_size
        decision = resume_block(cfg, checkpoint, state=state, start=start, checked=checked, ranks=ranks)
        feed = Feed(loader, Watchdog.of_run(cfg), held_out)
        return cls._open_outputs(cfg, parts, feed, state, decision, origins, stack)

    @classmethod
    def _open_outputs(
        cls,
        cfg: RunConfig,
        parts: StepParts,
        feed: Feed,
        state: TrainState,
        decision: str,
        origins: Mapping[str, str],
        stack: ExitStack,
    ) -> Run:
        first = torch.distributed.get_rank() == 0
        progress = Progress(cfg.train.steps, done=state.step, enabled=first)
        stack.callback(progress.close)
        writer = None
        if first:
            writer = MetricsWriter(cfg.train.run_dir, resumed_step=state.step, tensorboard=cfg.logging.tensorboard)
            stack.callback(writer.close)
        screen = startup_screen(
            cfg,
            topology=parts.topology,
            shape=feed.loader.step(state.consumed),
            mixture=run_shares(cfg, feed.loader.order) if first else (),
            origins=origins,
            digest=feed.loader.digest,
        )
        progress.line(screen)
        progress.line(decision)
        if writer is not None and writer.dropped:
            progress.line(f"  metrics            {writer.dropped} records after step {state.step} dropped, taken again")
        watchdog = feed.watchdog
        saver = Saver.open(parts, progress=progress, watchdog=watchdog, stack=stack)
        stack.enter_context(watchdog)
        peak = peak_tflops(cfg, device=parts.topology.device)
        return cls(cfg, parts, feed, state, peak, progress, writer, saver, watchdog)

    def ledger_text(self) -> str:
        """Return the ledger for people."""
        seen = self.feed.loader.order.seen(self.state.consumed)
        return ledger_text(self.state.ledger, seen, seq_length=self.cfg.data.seq_length)

    def save(self) -> None:
        """Save the current step (every rank must call)."""
        position = self.feed.loader.consumed
        assert position == self.state.consumed, f"loader at {position}, run at {self.state.consumed}"
        self.saver.save(self.state, data_digest=self.feed.loader.digest)


def _with_ledger(stored: TrainState | None, loader: Loader) -> TrainState:
    """Return where the run stands, its ledger under the names that the sources have now."""
    sources = loader.order.sources
    names = [source.name for source in sources]
    if stored is None:
        return TrainState.start(Ledger.empty(names, [s.kind for s in sources], [s.content for s in sources]))
    return replace(stored, ledger=stored.ledger.renamed(names))


def _fair_threads(place: Rendezvous) -> int:
    """Share this machine's cores among its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // place.local_world_size)


def _build_parts(cfg: RunConfig, topology: Topology) -> StepParts:
    models = build_chunks(cfg, stages=topology.stages)
    check_replicas(models, group=topology.groups.tp)
    chunks: list[DistributedDataParallel] = wrap_chunks(cfg, models)
    return StepParts(cfg=cfg, topology=topology, chunks=chunks, optimizer=build_optimizer(cfg, chunks))
