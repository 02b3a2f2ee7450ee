"""Answer the held-out questions with the trained model, and write down how well, beside two baselines.

    torchrun --nproc-per-node 2 -m examples.quickstart.evaluate_digits --run-dir runs/quickstart/sft

Writes ``evaluation.json`` and ``answers.png``. Exit code 1: void, shuffled pictures are answered
better than by chance; 2: something in the input is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

from mm15_megatron.errors import MM15Error

EXIT_VOID = 1
EXIT_BAD_INPUT = 2


def evaluate(run_dir: Path, data: Path, out: Path) -> int:
    """Answer, and write on rank 0; return the exit code."""
    # megatron-core warns of optional libraries that are absent, torch of names that megatron-core still uses.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed", category=FutureWarning)
    from examples.quickstart.answering import draw_answers, evaluate_all
    from mm15_megatron.evaluation.report import write_report
    from mm15_megatron.evaluation.restore import restore_model
    from mm15_megatron.parallel.rendezvous import discover, leave_together

    place = discover()
    with leave_together(place), ExitStack() as stack:
        restored = restore_model(str(run_dir), place=place, stack=stack)
        figures, asked, answers = evaluate_all(restored, data=data)
        if place.rank == 0:
            write_report(out / "evaluation.json", figures)
            draw_answers(out / "answers.png", asked, answers)
    if figures["void"] and place.rank == 0:
        sys.stderr.write(
            f"void: with shuffled pictures, {', '.join(figures['void'])} is answered better than by chance\n"
        )
    return EXIT_VOID if figures["void"] else 0


def main() -> int:
    """Read the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/quickstart/sft"), help="run directory with the checkpoints"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"), help="folder of the datasets")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder to write into")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        return evaluate(arguments.run_dir, arguments.data, arguments.out)
    except MM15Error as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
