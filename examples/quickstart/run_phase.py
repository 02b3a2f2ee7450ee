"""Run one phase of the quickstart as a child process: time it, watch its memory, perhaps stop it with a real signal.

    python -m examples.quickstart.run_phase --record PHASES --name NAME [--terminate-at STEP METRICS] -- COMMAND...

Appends one line to the record: name, seconds, exit code, and peak memory of the whole process tree. The exit code is
the command's; a phase that was to be terminated must have ended by that signal, and then exits with 0.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.5
EXIT_NOT_STOPPED = 3


def tree_memory(root: psutil.Process) -> int:
    """Return the bytes that a process tree holds; shared pages count once where the system can tell (PSS)."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            full = process.memory_full_info()
            total += int(full._asdict().get("pss") or full.rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended while the tree was walked
    return total


def steps_taken(metrics: Path) -> int:
    """Return how many steps the training metrics have recorded."""
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0


def run(command: list[str], *, terminate_at: int | None, metrics: Path | None) -> tuple[int, float, int, bool]:
    """Run a command to its end.

    Returns:
        Exit code, seconds, peak bytes of the process tree, and whether SIGTERM was sent.
    """
    start = time.monotonic()
    peak, sent = 0, False
    with subprocess.Popen(command) as child:
        try:
            root = psutil.Process(child.pid)
            while child.poll() is None:
                peak = max(peak, tree_memory(root))
                if (
                    terminate_at is not None
                    and metrics is not None
                    and not sent
                    and steps_taken(metrics) >= terminate_at
                ):
                    print(f"--- kill -TERM {child.pid} (step {steps_taken(metrics)} is done)", flush=True)
                    child.send_signal(signal.SIGTERM)
                    sent = True
                time.sleep(SAMPLE_SECONDS)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            raise
    return child.returncode, time.monotonic() - start, peak, sent


def main() -> int:
    """Read the command line, run the phase, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--name", required=True, help="name of the phase")
    parser.add_argument(
        "--terminate-at", nargs=2, metavar=("STEP", "METRICS"), help="send SIGTERM once STEP steps are recorded"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    step, metrics = arguments.terminate_at or (None, None)
    code, seconds, peak, sent = run(
        command, terminate_at=None if step is None else int(step), metrics=None if metrics is None else Path(metrics)
    )
    record = {
        "name": arguments.name,
        "seconds": round(seconds, 1),
        "exit_code": code,
        "terminated": sent,
        "peak_memory_mib": round(peak / 2**20),
    }
    with arguments.record.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
    print(f"--- {arguments.name}: {seconds:.1f} s, exit code {code}, peak memory {peak / 2**20:.0f} MiB", flush=True)
    if step is not None:
        return 0 if sent and code != 0 else EXIT_NOT_STOPPED
    return code


if __name__ == "__main__":
    sys.exit(main())
