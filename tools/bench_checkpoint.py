"""Measure what a checkpoint costs: blocked time and throughput, beside torch.save and the bare disk on the same bytes.

    python tools/bench_checkpoint.py [--preset P] [section.field=value ...] [--rounds 5] [--folder F] [--output PATH]
    torchrun --nproc-per-node=2 tools/bench_checkpoint.py parallel.tensor_model_parallel_size=2

One model is built and every way of saving it takes its turn in each round: ours in both formats, waiting and beside
the training (``checkpoint.async_save``), torch.save of the same tensors into one file a rank, and the same bytes
written block by block; each ends with the bytes synced to disk. Ours also reads samples back, hashes every file,
publishes and moves the tracker: the phases tell what that costs. A load checks every file first. While a save is on its
way beside the training, steps are timed against quiet ones. The folder decides which disk is measured; what is written
there is removed.

Debug presets are enlarged to some hundred million parameters; others are taken as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch

from mm15_megatron.bench.checkpoint import Bench, Measured, figures_of, report_lines
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import MM15Error
from mm15_megatron.evaluation.report import library_versions, machine_facts, write_report
from mm15_megatron.models.build import build_chunks
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.rendezvous import Rendezvous, discover
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.parity.stream import global_batch, rank_batches
from mm15_megatron.presets import resolve
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts, train_step
from mm15_megatron.utils.ranks import on_rank_zero

DEFAULTS = (
    "language.num_layers=8",
    "language.hidden_size=768",
    "language.num_attention_heads=12",
    "language.num_query_groups=12",
    "language.kv_channels=64",
    "language.ffn_hidden_size=2048",
    "language.vocab_size=32768",
    "train.global_batch_size=4",
)


def measure(cfg: RunConfig, *, place: Rendezvous, rounds: int, base: Path | None) -> Measured:
    """Build the model and take every way in turn."""
    with ExitStack() as stack:
        stack.callback(close_topology)
        topology = build_topology(cfg.parallel, place=place)
        seed_everything(cfg.train.seed, topology=topology)
        chunks = wrap_chunks(cfg, build_chunks(cfg, stages=topology.stages))
        parts = StepParts(cfg, topology, chunks, build_optimizer(cfg, chunks))
        wholes = rank_batches(
            global_batch(cfg, step=0), cfg, data_rank=topology.data_rank, data_size=topology.data_size
        )
        batches = [local_batch(whole, topology=topology, image_size=cfg.vision.image_size) for whole in wholes]
        train_step(parts, iter(batches), num_microbatches=len(batches))
        folder = Path(on_rank_zero(lambda: tempfile.mkdtemp(prefix="bench_checkpoint_", dir=base)))
        if place.rank == 0:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        say = (lambda text: print(text, file=sys.stderr, flush=True)) if place.rank == 0 else (lambda text: None)
        return Bench(parts, batches, folder=folder, say=say).run(rounds)


def main() -> int:
    """Read the command line, measure, print, write."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug_dense", help="start from this preset [debug_dense]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count [5]")
    parser.add_argument("--folder", type=Path, help="write below this folder [the system's for temporary files]")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json")
    parser.add_argument("options", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        place = discover()
        enlarged = DEFAULTS if arguments.preset.startswith("debug") else ()
        given = {option.partition("=")[0] for option in arguments.options}
        kept = [option for option in enlarged if option.partition("=")[0] not in given]
        cfg = apply_overrides(resolve(arguments.preset), [*kept, *arguments.options])
        measured = measure(cfg, place=place, rounds=arguments.rounds, base=arguments.folder)
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if place.rank == 0:
        _tell(measured, arguments.output, ranks=place.world_size)
    return 0


def _tell(measured: Measured, output: Path | None, *, ranks: int) -> None:
    command, machine = " ".join(["python", "tools/bench_checkpoint.py", *sys.argv[1:]]), machine_facts()
    lines = [
        "# What a checkpoint costs",
        "",
        f"`{command}` on {machine['processor']}, {machine['cores']} cores.",
        "",
        *report_lines(measured, ranks=ranks),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if output is not None:
        output.with_suffix(".md").write_text(text, encoding="utf-8")
        facts = {"command": command, "machine": machine, "versions": library_versions(), "ranks": ranks}
        write_report(output.with_suffix(".json"), {**figures_of(measured), **facts})


if __name__ == "__main__":
    sys.exit(main())
