"""What a person sees."""

from __future__ import annotations

import io

import pytest

from mm15_megatron.utils.progress import Progress, clock


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (5.4, "0:05"), (125, "2:05"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    """Minutes and seconds, hours when there are any."""
    assert clock(seconds) == text


def test_log_gets_plain_lines() -> None:
    """One line a step, no control characters."""
    stream = io.StringIO()
    progress = Progress(4, done=1, stream=stream)
    progress.update(2, "loss 1.0")
    progress.line("saved")
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 2/4 | loss 1.0 | ")
    assert second == "saved"
    assert "\r" not in stream.getvalue()


def test_terminal_gets_a_bar() -> None:
    """The bar rewrites its line; other lines stand alone."""
    stream = _Terminal()
    progress = Progress(4, stream=stream)
    progress.update(1, "a")
    progress.update(2, "b")
    progress.line("saved")
    assert stream.getvalue().count("\r") == 2
    assert "[############............] 2/4 b" in stream.getvalue()
    assert stream.getvalue().endswith("\nsaved\n")


def test_other_ranks_are_silent() -> None:
    """Nothing is written when disabled."""
    stream = io.StringIO()
    progress = Progress(4, enabled=False, stream=stream)
    progress.update(1, "a")
    progress.line("b")
    progress.close()
    assert stream.getvalue() == ""
