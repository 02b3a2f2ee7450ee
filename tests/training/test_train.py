"""Whole runs: killed and resumed, stopped by signals, in several layouts, and refused."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.checkpoint.publish import checkpoints_folder, published
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.train import EXIT_BAD_INPUT
from mm15_megatron.training.signals import EXIT_INTERRUPTED

from .runs import records, run_arguments, run_on_rank

Arguments = Callable[..., list[str]]


def _environment() -> dict[str, str]:
    launcher = ("SLURM", "RANK", "WORLD", "LOCAL", "MASTER", "TORCHELASTIC")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(launcher)}, "OMP_NUM_THREADS": "1"}


def _command(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=_environment(), timeout=240, check=False
    )


def test_killed_run_goes_on_as_if_it_had_not_been(arguments: Arguments, tmp_path: Path) -> None:
    """A run that dies between checkpoints repeats the lost steps; its record is bitwise the undisturbed run's."""
    steps = ["train.steps=6", "checkpoint.save_interval=2"]
    straight = arguments(*steps, run_dir="straight")
    assert run_arguments(straight)[0] == 0
    with pytest.raises(RankFailure, match="the process died without a word"):
        run_arguments(arguments(*steps), trap=("step 3/", signal.SIGKILL, 0))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002\n"
    code, log = run_arguments(arguments(*steps, "checkpoint.resume=required"))
    assert code == 0
    assert "go on from step_00000002, named by the tracker" in log
    assert "1 records after step 2 dropped" in log
    names = ("step", "train/loss", "train/grad_norm", "data/consumed_rows", "lr/language")
    seen = [[record[name] for name in names] for record in records(tmp_path / "run")]
    assert seen == [[record[name] for name in names] for record in records(tmp_path / "straight")]
    assert [record[0] for record in seen] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_signal_to_one_rank_stops_all(number: signal.Signals, rank: int, arguments: Arguments, tmp_path: Path) -> None:
    """A real signal to a real rank: all finish the step, a checkpoint is published, the exit code says so."""
    argv = arguments("train.steps=1000", "train.global_batch_size=4")
    code, log = run_arguments(argv, world_size=2, trap=("step 2/", number, rank))
    assert code == EXIT_INTERRUPTED
    stopped = re.search(rf"stopped by {number.name} after step (\d+)", log)
    assert stopped is not None, log
    assert 2 <= int(stopped[1]) <= 4
    assert published(checkpoints_folder(tmp_path / "run"))[-1].name == f"step_{int(stopped[1]):08d}"
    assert records(tmp_path / "run")[-1]["step"] == int(stopped[1])


def test_signal_in_a_validation_is_honoured_after_it(arguments: Arguments, tmp_path: Path) -> None:
    """No step is begun any more, and the step that was due to be saved anyway is saved once."""
    argv = arguments("train.steps=9", "train.validation_interval=2", "train.validation_steps=1")
    trap = ("step 2 held-out loss", signal.SIGTERM, 0)
    code, log = run_arguments([*argv, "checkpoint.save_interval=2"], trap=trap)
    assert code == EXIT_INTERRUPTED
    assert "stopped by SIGTERM after step 2;" in log
    assert log.count("saved ") == 1
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("before", [0, 3])
def test_signal_while_building_saves_nothing(before: int, arguments: Arguments, tmp_path: Path) -> None:
    """The rank that is told to stop while it builds takes the others along; no step, no new checkpoint."""
    if before:
        run_arguments(arguments(f"train.steps={before}"))
    code, log = run_arguments(arguments("train.steps=9"), world_size=2, trap=("run\n", signal.SIGUSR1, 0))
    assert code == EXIT_INTERRUPTED
    assert f"stopped by SIGUSR1 after step {before};" in log
    assert "saved " not in log
    assert len(published(checkpoints_folder(tmp_path / "run"))) == (1 if before else 0)
    assert len(records(tmp_path / "run")) == before


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for_listener(port: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[1])


def test_signal_while_ranks_meet(arguments: Arguments, tmp_path: Path) -> None:
    """The command line is stopped while it waits for its other rank: it finishes building and leaves with code 75."""
    port = _free_port()
    argv = [sys.executable, "-m", "mm15_megatron.train", *arguments()]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(2):
            env = _environment() | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
            if rank == 0:
                _wait_for_listener(port, ranks[0])
                ranks[0].send_signal(signal.SIGTERM)
        answers = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [EXIT_INTERRUPTED] * 2, answers
    assert "stopped by SIGTERM after step 0;" in answers[0][0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_figures_and_validation(arguments: Arguments, tmp_path: Path) -> None:
    """Every step has one record with throughput, utilisation and held-out loss, whatever layout goes on."""
    parallel = ["parallel.tensor_model_parallel_size=2", "logging.peak_tflops=0.5"]
    validation = ["train.validation_interval=2", "train.validation_steps=2"]
    code, log = run_arguments(arguments("train.steps=4", *parallel, *validation), world_size=2)
    assert code == 0
    assert "tensor 2 x pipeline 1 x data 1" in log
    assert "fresh start: the tracker names no checkpoint" in log
    assert [("validation/loss" in record) for record in records(tmp_path / "run")] == [False, True, False, True]
    assert [("validation/seconds" in record) for record in records(tmp_path / "run")] == [False, True, False, True]
    assert re.search(r"step 4 held-out loss \d\.\d{4} \(\d+\.\d s\)", log)
    last = records(tmp_path / "run")[-1]
    assert last["speed/model_tflops_per_rank"] == pytest.approx(last["speed/model_tflop"] / last["speed/seconds"] / 2)
    assert last["speed/utilisation"] == pytest.approx(last["speed/model_tflops_per_rank"] / 0.5)
    assert last["data/consumed_rows"] == 32
    assert last["speed/tiles_per_second"] > 0
    assert last["lr/language"] == pytest.approx(1e-4)  # the floor of 1e-3, reached at the last step
    code, log = run_arguments(arguments("train.steps=6", *validation))
    assert code == 0
    assert re.search(r"layout +2 ranks, tensor 2; now 1 rank\n", log)
    assert "parallel.tensor_model_parallel_size: 2 -> 1" in log
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "nothing to do: the checkpoint has 6 of 6 steps" in run_arguments(arguments("train.steps=6"))[1]


def test_batch_size_ramp_is_taken_and_resumed(arguments: Arguments, tmp_path: Path) -> None:
    """The batch grows by the plan, also across a resume."""
    for steps in (3, 6):
        run_arguments(arguments("train.rampup_batch_size=[4,2,16]", f"train.steps={steps}", "schedule.decay_steps=6"))
    seen = records(tmp_path / "run")
    assert [record["data/global_batch"] for record in seen] == [4, 4, 6, 6, 8, 8]
    assert [record["data/consumed_rows"] for record in seen] == [4, 8, 14, 20, 28, 36]


@pytest.mark.parametrize("workers", [0, 1])
def test_saving_while_images_are_decoded(workers: int, arguments: Arguments, tmp_path: Path) -> None:
    """A process in which the image decoder lives must not fork: saving does not, and the pipeline runs on."""
    argv = arguments("train.steps=3", "checkpoint.save_interval=1")
    argv = [a for a in argv if not a.startswith(("data.decoder", "data.num_workers"))]
    code, log = run_arguments([*argv, "data.decoder=dali", f"data.num_workers={workers}"])
    assert code == 0
    assert log.count("saved ") == 3
    assert "this process forks" not in log


def test_other_data_is_refused(arguments: Arguments) -> None:
    """Rows in another order are not the rows that were consumed."""
    run_arguments(arguments("train.steps=3"))
    with pytest.raises(
        RankFailure, match=r"the order of the training data is not the checkpoint's.*\n +train.seed: 1234 -> 5"
    ):
        run_arguments(arguments("train.steps=4", "train.seed=5"))


def test_other_data_is_found_before_the_checkpoint_is_read(arguments: Arguments, tmp_path: Path) -> None:
    """What is wrong with the data is said first: the tensors of this checkpoint could not be read at all."""
    run_arguments(arguments("train.steps=3"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003" / "tensors")
    with pytest.raises(RankFailure, match="the order of the training data is not the checkpoint's"):
        run_arguments(arguments("train.steps=4", "train.seed=5"))
    with pytest.raises(RankFailure, match="step_00000003 is damaged: tensors/"):
        run_arguments(arguments("train.steps=4"))


def _run_in_little_memory(argv: list[str]) -> None:
    """Run with room for a process and a small model, not for three billion weights (12 GB)."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, resource.RLIM_INFINITY))
    run_on_rank(argv)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.sources=[{prefix: absent}]", "DataError: no dataset at prefix absent"),
        ("data.tokenizer=absent.json", "DataError: .*absent.json"),
        ("train.steps=200000", "can't allocate memory"),
    ],
)
def test_data_are_checked_before_weights_exist(argument: str, message: str, arguments: Arguments) -> None:
    """A model that does not fit into memory is never begun when the data are missing."""
    option = argument.partition("=")[0] + "="
    shared = [given for given in arguments()[2:] if not given.startswith(option)]
    argv = ["--preset", "mm1_3b", "parallel.device=cpu", "kernels.transformer_impl=local", *shared, argument]
    with pytest.raises(RankFailure, match=message):
        run_on_ranks(_run_in_little_memory, 1, argv=argv)


def test_torchrun(arguments: Arguments, tmp_path: Path) -> None:
    """The command line under the real launcher."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mm15_megatron.train")
    done = _command(
        *launch, *arguments("train.steps=3", "parallel.tensor_model_parallel_size=2", "logging.tensorboard=true")
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks (torchrun): tensor 2 x pipeline 1 x data 1" in done.stdout
    assert done.stdout.count("step 3/3 |") == 1
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.stepz=3", "ConfigError: section 'train' has no field 'stepz'"),
        ("parallel.device=cuda", "BackendError: "),
    ],
)
def test_bad_input_is_one_message(argument: str, message: str, arguments: Arguments) -> None:
    """What is wrong with the input is said once, without a traceback, and the exit code tells it from a failure."""
    if argument == "parallel.device=cuda" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    failed = _command("-m", "mm15_megatron.train", *arguments(argument))
    assert failed.returncode == EXIT_BAD_INPUT, failed.stderr
    assert failed.stderr.startswith(message)
    assert "\n  fix: " in failed.stderr
    assert "Traceback" not in failed.stderr


def test_print_config_needs_no_torch(arguments: Arguments) -> None:
    """--print-config answers without importing torch."""
    code = (
        "import sys; from mm15_megatron.train import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = _command("-c", code, *arguments("--print-config"))
    assert done.returncode == 0, done.stderr
    assert "train.steps = 20  # preset debug_dense" in done.stdout
