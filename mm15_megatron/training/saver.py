"""Checkpoints of a run: written while it waits, or while it goes on."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from mm15_megatron.checkpoint.background import BackgroundWriter, GivenUp
from mm15_megatron.checkpoint.save import take_snapshot, write_snapshot
from mm15_megatron.training.state import TrainState
from mm15_megatron.training.step import StepParts
from mm15_megatron.training.watchdog import Watchdog
from mm15_megatron.utils.progress import Progress
from mm15_megatron.utils.ranks import gathered_objects

_LOOKS_EVERY = 0.1  # seconds


class Saver:
    """Saves a run; says that a checkpoint is saved once it is on disk, proven and tracked, not before.

    Every rank must make each call, in the same order.

    Args:
        parts: model, optimizer and groups.
        progress: what a person sees.
        watchdog: hears what a save does.
        background: writes beside the training; None = the run waits.
    """

    def __init__(
        self, parts: StepParts, *, progress: Progress, watchdog: Watchdog, background: BackgroundWriter | None
    ) -> None:
        self._parts = parts
        self._progress = progress
        self._watchdog = watchdog
        self._background = background
        self._lost = False

    @classmethod
    def open(cls, parts: StepParts, *, progress: Progress, watchdog: Watchdog, stack: ExitStack) -> Saver:
        """Make the saver that ``checkpoint.async_save`` wants."""
        background = None
        if parts.cfg.checkpoint.async_save:
            timeout = parts.cfg.parallel.distributed_timeout_minutes
            background = BackgroundWriter(parts.topology.place, timeout_minutes=timeout)
            stack.callback(background.close)
        return cls(parts, progress=progress, watchdog=watchdog, background=background)

    @property
    def lost(self) -> bool:
        """Whether a save beside the training failed and none has replaced it."""
        return self._lost

    def save(self, state: TrainState, *, data_digest: str) -> None:
        """Save the run as it stands; in the background, once the save before has arrived.

        Raises:
            CheckpointError: it could not be written while the run waits.
        """
        self.finish()
        self._watchdog.enter("save: snapshot")
        began = time.monotonic()
        parts = self._parts
        assert parts.optimizer is not None, "a run has an optimizer"
        snapshot = take_snapshot(
            parts.cfg,
            parts.chunks,
            parts.optimizer,
            topology=parts.topology,
            step=state.step,
            data_digest=data_digest,
            progress=state.as_dict(),
        )
        if self._background is None:
            self._tell(str(write_snapshot(snapshot, tell=self._told)), time.monotonic() - began)
            self._lost = False
            return
        self._background.submit(snapshot)
        self._progress.line(f"step {state.step} copied in {time.monotonic() - began:.2f} s, on its way to disk")

    def look(self) -> None:
        """Between two steps: tell of a save that has arrived everywhere, or failed somewhere."""
        if self._background is None or not self._background.busy:
            return
        if self._settled(self._background):
            self.finish()

    def _settled(self, background: BackgroundWriter) -> bool:
        """Whether a save has arrived everywhere, or failed somewhere: a writer may wait for one that is gone."""
        flags = torch.tensor([not background.ready, background.failed], device=self._parts.topology.device).int()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        pending, failed = flags.tolist()
        return bool(failed) or not pending

    def finish(self) -> None:
        """Wait for a save that is on its way, and tell of it.

        One that failed costs no run: from then on the run waits for its saves, and takes the next one at once
        (:attr:`lost`).
        """
        background = self._background
        if background is None or not background.busy:
            return
        self._watchdog.enter("save: wait for the writer")
        while not self._settled(background):
            phase = background.phase
            time.sleep(_LOOKS_EVERY)
            if background.phase != phase:
                self._watchdog.enter(f"save: wait for the writer: {background.phase}")
        background.give_up()
        mine = background.result()
        self._watchdog.enter("save: hear of the other writers")
        written = gathered_objects(mine)
        errors = [(rank, one.error) for rank, one in enumerate(written) if one.error is not None]
        if errors:
            rank, error = min(errors, key=lambda found: isinstance(found[1], GivenUp))  # the cause before its effects
            self._progress.line(
                f"rank {rank}: {error.problem} ({error.fix}). The checkpoint before it is untouched. The run is saved "
                "now, and waits for this save and those that follow"
            )
            background.close()
            self._background, self._lost = None, True
            return
        self._tell(written[0].folder, max(one.seconds for one in written))

    def _told(self, phase: str) -> None:
        self._watchdog.enter(f"save: {phase}")

    def _tell(self, folder: str, seconds: float) -> None:
        self._progress.line(f"saved {folder} ({seconds:.1f} s until it was on disk, proven and tracked)")
