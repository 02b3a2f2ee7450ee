"""The loader of one rank: micro-batches in order, for ever, decoded by worker processes that are never forked."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset

from mm15_megatron.batch import MMBatch, RankView
from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.data.batch_plan import BatchPlan
from mm15_megatron.data.collate import Assembler, ImageSettings, MicroBatchTask
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.permutation import derive_key
from mm15_megatron.data.row_order import PackingReport, RowOrder
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import ConfigError, DataError

_LOGGER = logging.getLogger(__name__)
_START_METHOD: Final = "forkserver"
USABLE_KINDS: Final = ("captions", "conversations")  # text and interleaved need long documents to be split first


class _MicroBatches(Dataset[MMBatch]):
    """A map from the content of a micro-batch to the micro-batch."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def __getitem__(self, task: MicroBatchTask) -> MMBatch:
        return self._assembler(task)


class _TaskStream:
    """The endless sequence of one rank's micro-batches, as row contents. It runs in the training process alone."""

    def __init__(
        self, order: RowOrder, plan: BatchPlan, *, data_rank: int, consumed_rows: int, counts_steps: bool
    ) -> None:
        self._order = order
        self._counts_steps = counts_steps
        self._plan = plan
        self._data_rank = data_rank
        self._consumed_rows = consumed_rows

    def __iter__(self) -> Iterator[MicroBatchTask]:
        consumed = self._consumed_rows
        while True:
            stop = consumed + self._plan.rows_of_step(consumed)
            dealt = self._plan.micro_batches(consumed, self._data_rank, tiles_R=self._order.tiles(consumed, stop))
            tasks = [tuple(self._order.row(row) for row in rows) for rows in dealt]
            yield MicroBatchTask(tasks[0], step_rows=tuple(chain.from_iterable(tasks)) if self._counts_steps else ())
            yield from map(MicroBatchTask, tasks[1:])
            consumed = stop


def _same(batch: Any) -> Any:
    return batch


_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


@contextmanager
def _held_back(signals: set[signal.Signals]) -> Iterator[None]:
    """Start processes that never see ``signals``; for this process they wait until the end of the block.

    Launchers signal every process of a job. A blocked signal stays blocked in children, so the workers, the server that
    forks them and Python's resource tracker leave it to the training process, which finishes its step and closes the
    loader.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        resource_tracker.ensure_running()  # Python unblocks SIGTERM once it has started it: block again afterwards
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _prepare_worker(_: int) -> None:
    """Leave Ctrl-C to the training process too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader:
    """Iterate the micro-batches of one rank, in order and without end.

    Args:
        assembler: makes a micro-batch from the content of its rows.
        order: the content of each row.
        plan: rows of a step, and who takes which.
        view: the rank that is fed.
        consumed_rows: rows consumed before this loader starts (a whole number of steps).
        num_workers: worker processes; 0 = work in this process. It never changes what comes out.
        prefetch_factor: micro-batches each worker prepares ahead, a bound on memory.
        counts_steps: the first micro-batch of each step carries ``step_counts``, which only routers need: the rank's
            rows are then laid out a second time.

    Attributes:
        plan: the plan.
        digest: SHA-256 of everything that decides which row comes when.
        wait_seconds: time spent waiting for micro-batches.
        substituted: images replaced by the mean colour.
    """

    def __init__(
        self,
        assembler: Assembler,
        order: RowOrder,
        plan: BatchPlan,
        *,
        view: RankView,
        consumed_rows: int,
        num_workers: int,
        prefetch_factor: int,
        counts_steps: bool = True,
    ) -> None:
        self.plan = plan
        self.digest = order.digest
        self.wait_seconds = 0.0
        self.substituted = 0
        self._order = order
        # One rank of the run tells what packing left out, once for each epoch of a source.
        self._tells = view.reads_images and view.data_rank == view.tensor_rank == 0
        self._told = [0] * len(order.reports)
        stream = _TaskStream(
            order, plan, data_rank=view.data_rank, consumed_rows=consumed_rows, counts_steps=counts_steps
        )
        before = set(multiprocessing.active_children())
        loader = DataLoader(
            _MicroBatches(assembler),
            batch_size=None,
            sampler=stream,
            collate_fn=_same,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            multiprocessing_context=_START_METHOD if num_workers else None,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # its own: the training process's random state is not touched
        )
        with _held_back(_STOP_SIGNALS):
            self._batches: Iterator[MMBatch] | None = iter(loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]

    def __iter__(self) -> Loader:
        """Return itself: there is one position."""
        return self

    def __next__(self) -> MMBatch:
        """Return the next micro-batch.

        Raises:
            DataError: for bad data (with the worker's traceback), a worker that died, or a closed loader.
        """
        if self._batches is None:
            raise DataError("the data loader is closed", fix="build another one")
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not self._lost_a_worker(error):
                raise
            raise DataError(
                f"a data worker died: {error}",
                fix="look for an out-of-memory kill; lower data.num_workers, data.prefetch_factor or data.max_tiles",
            ) from error
        finally:
            self.wait_seconds += time.perf_counter() - start
        for message in (message for row in batch.rows for message in row.substituted):
            self.substituted += 1
            _LOGGER.warning("replaced by the mean colour: %s", message)
        if self._tells:
            self._tell_losses()
        return batch

    def _tell_losses(self) -> None:
        for source, report in enumerate(self.reports):
            if report.epochs > self._told[source] and (report.dropped or report.truncated):
                _LOGGER.warning("%s", report)
            self._told[source] = report.epochs

    @property
    def reports(self) -> tuple[PackingReport, ...]:
        """What packing kept, truncated and dropped so far, one report a source; packing runs ahead of the batches."""
        return self._order.reports

    def rows_before_repeat(self, limit: int) -> int:
        """Return how many rows of the order show no document twice, at most ``limit`` (work grows with it)."""
        return self._order.rows_before_repeat(limit)

    def micro_batches_per_step(self, consumed_rows: int) -> int:
        """Return the micro-batches of the step that starts after ``consumed_rows`` rows."""
        return self.plan.micro_batches_per_step(consumed_rows)

    def close(self) -> None:
        """End the workers; closing twice is fine."""
        self._batches = None  # torch ends its workers when the iterator goes
        for worker in self._workers:
            if worker.is_alive():  # wedged in native code, or past torch's patience
                worker.kill()
            worker.join()
        self._workers = []

    def _lost_a_worker(self, error: Exception) -> bool:
        """Tell a dead worker from an error inside a living one.

        torch names the death when it waits for a batch; a death while a batch is handed over shows as a broken pipe.
        """
        if str(error).startswith("DataLoader worker (pid"):
            return True
        for worker in self._workers:
            worker.join(timeout=1.0)  # its end may be an instant away
        return any(not worker.is_alive() for worker in self._workers)

    def __enter__(self) -> Loader:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def build_loader(cfg: RunConfig, *, view: RankView, consumed_rows: int = 0, validation: bool = False) -> Loader:
    """Open the sources of a run and build the loader of one rank.

    Args:
        cfg: the run.
        view: the rank that is fed.
        consumed_rows: rows of the training order consumed so far; a resumed run starts at the next one.
        validation: read ``data.validation_sources``, with a constant batch size.

    Raises:
        ConfigError: if there is no source, or a batch size cannot be split.
        DataError: if a tokenizer or a dataset is missing, damaged, or does not belong to the run.
    """
    sources = cfg.data.validation_sources if validation else cfg.data.sources
    if not sources:
        field = "data.validation_sources" if validation else "data.sources"
        raise ConfigError(f"{field} is empty", fix="name at least one dataset prefix")
    tokenizer = Tokenizer(cfg.data.tokenizer)
    tokenizer.check_fits(cfg.language.vocab_size)
    readers = open_sources(sources, tokenizer=tokenizer)
    rules = PackingRules.from_config(cfg, image_sentinel_id=tokenizer.image_id)
    order = RowOrder(
        readers,
        [source.weight for source in sources],
        rules,
        seed=derive_key(cfg.train.seed, "validation" if validation else "training"),
        unit=cfg.data.mixture_unit,
        shuffle=cfg.data.shuffle == "full",
    )
    plan = BatchPlan(
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        data_size=view.data_size,
        rampup=None if validation else cfg.train.rampup_batch_size,
        row_dealing=cfg.data.row_dealing,
    )
    return Loader(
        Assembler(readers, rules, view=view, settings=ImageSettings.from_config(cfg)),
        order,
        plan,
        view=view,
        consumed_rows=consumed_rows,
        num_workers=cfg.data.num_workers if view.reads_images else 0,
        prefetch_factor=cfg.data.prefetch_factor,
        counts_steps=cfg.moe.num_moe_experts > 0 and not validation,
    )


def open_sources(sources: Sequence[SourceConfig], *, tokenizer: Tokenizer) -> list[IndexedSource]:
    """Open every source of a mixture and check it against the tokenizer.

    Raises:
        DataError: if one is missing or damaged, was built with another tokenizer, is of a kind that is not in
            ``USABLE_KINDS``, or two have one name.
    """
    readers = [IndexedSource(s.prefix, name=s.name, tokenizer_digest=tokenizer.digest) for s in sources]
    for reader in readers:
        if reader.kind not in USABLE_KINDS:
            raise DataError(
                f"source {reader.name!r} is of kind {reader.kind!r}: splitting of long documents is not there yet",
                fix="use sources of kind " + " or ".join(USABLE_KINDS),
            )
    names = [reader.name for reader in readers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"several sources are called {', '.join(twice)}", fix="give each source its own name")
    return readers
