"""The loader of one rank: micro-batches in order, for ever, decoded by worker processes that are never forked."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset

from mm15_megatron.batch import MMBatch, RankView
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.batch_plan import BatchPlan
from mm15_megatron.data.collate import Assembler, ImageSettings, MicroBatchTask
from mm15_megatron.data.open_order import OpenOrder, open_order
from mm15_megatron.data.row_order import RowOrder, RowRange, RowTask
from mm15_megatron.data.source_order import PackingReport
from mm15_megatron.errors import DataError
from mm15_megatron.utils.processes import leave_with_parent

_LOGGER = logging.getLogger(__name__)
_START_METHOD: Final = "forkserver"
_STEPS_KEPT: Final = 8


class _MicroBatches(Dataset[MMBatch]):
    """A map from the content of a micro-batch to the micro-batch."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def __getitem__(self, task: MicroBatchTask) -> MMBatch:
        return self._assembler(task)


class _Steps:
    """The rows of each step; asked by the training loop, and by the stream of tasks, which runs ahead of it."""

    def __init__(self, order: RowOrder, plan: BatchPlan, *, keep: int) -> None:
        self._order = order
        self._plan = plan
        self._keep = keep
        self._kept: OrderedDict[int, RowRange] = OrderedDict()

    def at(self, consumed: int) -> RowRange:
        """Return the rows of the step that starts after ``consumed`` units, filled up."""
        if consumed not in self._kept:
            rows = self._order.step(consumed, self._plan.units_of_step(consumed))
            self._kept[consumed] = self._plan.filled_up(rows)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return self._kept[consumed]

    def known(self, consumed: int) -> RowRange | None:
        """Return the rows of a step that was asked for before; nothing is read or packed."""
        return self._kept.get(consumed)


class _TaskStream:
    """The endless sequence of one rank's micro-batches, as row contents. It runs in the training process alone."""

    def __init__(self, steps: _Steps, plan: BatchPlan, *, data_rank: int, consumed: int, counts_steps: bool) -> None:
        self._steps = steps
        self._counts_steps = counts_steps
        self._plan = plan
        self._data_rank = data_rank
        self._consumed = consumed

    def __iter__(self) -> Iterator[MicroBatchTask]:
        consumed = self._consumed
        while True:
            tasks = self._plan.micro_batches(self._data_rank, self._steps.at(consumed))
            yield MicroBatchTask(tasks[0], step_rows=tuple(chain.from_iterable(tasks)) if self._counts_steps else ())
            yield from map(MicroBatchTask, tasks[1:])
            consumed += self._plan.units_of_step(consumed)


@dataclass(frozen=True)
class StepShape:
    """What a step consists of.

    Attributes:
        units: rows or samples (``data.batch_unit``) that it consumes.
        rows: its rows, those without samples included.
        micro_batches: micro-batches of each rank.
    """

    units: int
    rows: int
    micro_batches: int


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
    """Leave Ctrl-C to the training process too, and go when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()


class Loader:
    """Iterate the micro-batches of one rank, in order and without end.

    Args:
        assembler: makes a micro-batch from the content of its rows.
        order: the content of each row.
        plan: rows of a step, and who takes which.
        view: the rank that is fed.
        consumed: units consumed before this loader starts (a whole number of steps).
        num_workers: worker processes; 0 = work in this process. It never changes what comes out.
        prefetch_factor: micro-batches each worker prepares ahead, a bound on memory.
        pin_memory: hand out batches in page-locked memory; needs CUDA.
        counts_steps: the first micro-batch of each step carries ``step_counts``, which only routers need: the rank's
            rows are then laid out a second time.

    Attributes:
        plan: the plan.
        order: as given.
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
        consumed: int,
        num_workers: int,
        prefetch_factor: int,
        pin_memory: bool = False,
        counts_steps: bool = True,
    ) -> None:
        self.plan = plan
        self.digest = order.digest
        self.wait_seconds = 0.0
        self.substituted = 0
        self.order = order
        # One rank of the run tells what packing left out, once for each epoch of a source.
        self._tells = is_first_reader(view)
        self._told = [report.epochs for report in order.reports]  # an order that stays open was told of before
        self._consumed, self._handed_out, self._data_rank = consumed, 0, view.data_rank
        # what workers prepare ahead is asked for again when it is handed out
        self._steps = _Steps(order, plan, keep=_STEPS_KEPT + num_workers * prefetch_factor)
        stream = _TaskStream(self._steps, plan, data_rank=view.data_rank, consumed=consumed, counts_steps=counts_steps)
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
            pin_memory=pin_memory,
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
        for replaced in (one for row in batch.rows for one in row.substituted):
            self.substituted += 1
            _LOGGER.warning("replaced by the mean colour: %s", replaced.message)
        if self._tells:
            self._tell_losses()
        self._handed_out += 1
        shape = self.step(self._consumed)
        if self._handed_out == shape.micro_batches:
            self._handed_out, self._consumed = 0, self._consumed + shape.units
        return batch

    @property
    def consumed(self) -> int:
        """Units of the steps whose micro-batches were all handed out, and of those before this loader started."""
        return self._consumed

    @property
    def upcoming(self) -> tuple[RowTask, ...]:
        """Rows of the micro-batch that comes next, or that is waited for; () where that is not known yet.

        Nothing is read for it, so that another thread may ask while this one hangs in a read.
        """
        rows = self._steps.known(self._consumed)
        return () if rows is None else self.plan.micro_batches(self._data_rank, rows)[self._handed_out]

    def state_dict(self) -> dict[str, int | str]:
        """Return where to go on: ``build_loader(cfg, consumed=state["consumed"])``, if the digest is the same then."""
        return {"consumed": self.consumed, "unit": self.plan.batch_unit, "digest": self.digest}

    def _tell_losses(self) -> None:
        for source, report in enumerate(self.reports):
            if report.epochs > self._told[source] and report.loses:
                _LOGGER.warning("%s", report)
            self._told[source] = report.epochs

    @property
    def reports(self) -> tuple[PackingReport, ...]:
        """What packing kept, truncated and dropped so far, one report a source; packing runs ahead of the batches."""
        return self.order.reports

    def rows_before_repeat(self, limit: int) -> int:
        """Return how many rows of the order show no document twice, at most ``limit`` (work grows with it)."""
        return self.order.rows_before_repeat(limit)

    def step(self, consumed: int) -> StepShape:
        """Return the shape of the step that starts after ``consumed`` units."""
        rows = len(self._steps.at(consumed).tasks)
        per_round = self.plan.micro_batch_size * self.plan.data_size
        return StepShape(self.plan.units_of_step(consumed), rows, rows // per_round)

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


def build_loader(
    cfg: RunConfig, *, view: RankView, consumed: int = 0, validation: bool = False, opened: OpenOrder | None = None
) -> Loader:
    """Open the sources of a run and build the loader of one rank.

    Args:
        cfg: the run.
        view: the rank that is fed.
        consumed: rows or samples (``data.batch_unit``) consumed so far; a resumed run starts at the next one.
        validation: read ``data.validation_sources``, with a constant batch size.
        opened: the sources and their order, if they are open already.

    Raises:
        ConfigError: if there is no source, a batch size cannot be split, or the epochs of the sources do not fit the
            length of the run.
        DataError: if a tokenizer or a dataset is missing, damaged, or does not belong to the run.
    """
    opened = opened or open_order(cfg, validation=validation, writes=is_first_reader(view))
    interleaves = cfg.parallel.virtual_pipeline_model_parallel_size is not None
    plan = BatchPlan(
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        data_size=view.data_size,
        rampup=None if validation else cfg.train.rampup_batch_size,
        row_dealing=cfg.data.row_dealing,
        batch_unit=cfg.data.batch_unit,
        # the interleaved schedule takes whole rounds; batches of rows were checked by the rules of the configuration
        micro_batch_multiple=cfg.parallel.pipeline_model_parallel_size if interleaves else 1,
    )
    return Loader(
        Assembler(opened.readers, opened.rules, view=view, settings=ImageSettings.from_config(cfg)),
        opened.order,
        plan,
        view=view,
        consumed=consumed,
        num_workers=cfg.data.num_workers if view.reads_images else 0,
        prefetch_factor=cfg.data.prefetch_factor,
        pin_memory=cfg.parallel.device == "cuda",
        counts_steps=cfg.moe.num_moe_experts > 0 and not validation,
    )


def is_first_reader(view: RankView) -> bool:
    """Tell whether a rank is the one of the run that speaks of the data, and writes its tables."""
    return view.reads_images and view.data_rank == view.tensor_rank == 0
