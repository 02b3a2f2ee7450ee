"""Train: ``python -m mm15_megatron.train --preset debug_dense --config run.yaml``, alone or under a launcher.

Launchers are torchrun, srun and mpiexec.

Exit codes: 0 the run is complete; 2 something in the input is wrong, and one message says what; 3 loss or gradients
stopped the run (``faults``), saved; 4 a rank hung, and the others named it and left: start the same command again; 75 a
signal (SIGTERM, SIGUSR1) stopped the run, its last step is saved, and the same command goes on from there. Anything
else is a bug.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mm15_megatron.config.parse import ParsedRun, parse_run
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError, DataError, MM15Error
from mm15_megatron.presets import REGISTRY

if TYPE_CHECKING:
    from mm15_megatron.parallel.rendezvous import Rendezvous

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        parsed = parse_run(sys.argv[1:] if argv is None else argv, presets=REGISTRY)
        if parsed.output is not None:
            sys.stdout.write(parsed.output)
            return 0
        return _plan(parsed.config) if parsed.plans else _train(parsed)
    except MM15Error as error:
        return _report(error)


def _plan(cfg: RunConfig) -> int:
    """Print what the run would read; needs no rank, no device and no torch."""
    from mm15_megatron.config.validate import check_data
    from mm15_megatron.data.plan import plan_text
    from mm15_megatron.utils.progress import Progress

    check_data(cfg)
    bars: dict[str, Progress] = {}

    def tell(done: int, total: int, source: str) -> None:
        bar = bars.setdefault(source, Progress(total, noun="chunk", stream=sys.stderr))
        bar.update(done, f"packing an epoch of {source}")
        if done == total:
            bar.close()

    sys.stdout.write(plan_text(cfg, tell=tell))
    return 0


def _train(parsed: ParsedRun) -> int:
    # megatron-core warns at import about every optional library that is absent; which ones are used is decided by the
    # configuration, not by what is installed. Imported here so that --help and --print-config need no torch.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Its calls of collectives that torch is about to rename are not the user's to mend either.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from mm15_megatron.parallel.rendezvous import discover, leave_together

    place = discover()
    logging.basicConfig(level=logging.WARNING, format=f"[rank {place.rank}] %(levelname)s %(name)s: %(message)s")
    with leave_together(place):
        try:
            return _train_at(place, parsed)
        except MM15Error as error:
            return _report(error)


def _train_at(place: Rendezvous, parsed: ParsedRun) -> int:
    from mm15_megatron.config.validate import validate
    from mm15_megatron.training import loop
    from mm15_megatron.training.run import Run
    from mm15_megatron.training.signals import StopRequest

    validate(parsed.config, world_size=place.world_size)
    with StopRequest() as request, ExitStack() as stack:
        run = Run.build(parsed.config, origins=parsed.origins, place=place, stack=stack)
        return loop.run(run, request=request)


def _report(error: MM15Error) -> int:
    """Show an error once: all ranks meet the same, but for data and devices, where a rank may be alone with it.

    Returns:
        The exit code.
    """
    from mm15_megatron.utils.ranks import launched_rank

    rank = launched_rank()
    if rank == 0:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    elif isinstance(error, (DataError, BackendError)):
        sys.stderr.write(f"[rank {rank}] {type(error).__name__}: {error.problem}\n")
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
