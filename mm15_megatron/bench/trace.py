"""What a profile says: kernel time by class, how long the device stood still, how often the host waited for it.

Works on the events of a Chrome trace as torch.profiler writes them (times in microseconds), so it needs no device.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm15_megatron.bench.kernels import CLASSES, class_of

_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_CATEGORIES = ("cuda_runtime", "cuda_driver")
HOST_WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuCtxSynchronize",
)
"""Calls in which the host waits for the device."""
TO_HOST = "Memcpy DtoH"
GAP_US = 10.0
"""Shorter pauses lie between any two kernels."""
_SHOWN_KERNELS, _SHOWN_GAPS, _NAME_LENGTH = 25, 5, 160


@dataclass(frozen=True)
class Span:
    """One piece of work on the device; times in microseconds."""

    name: str
    start: float
    end: float

    @property
    def length(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Gap:
    """A time in which the device did nothing, in microseconds, and the work on either side."""

    length: float
    after: str
    before: str


@dataclass(frozen=True)
class Stillness:
    """How much of a window the device worked; microseconds.

    Attributes:
        window: from the first piece of work to the end of the last one.
        busy: time in which at least one piece of work ran, on any stream.
        gaps: pauses longer than ``GAP_US``.
        longest: the longest of them.
    """

    window: float
    busy: float
    gaps: int
    longest: tuple[Gap, ...]

    @property
    def idle_share(self) -> float:
        """Share of the window in which nothing ran."""
        return 1 - self.busy / self.window if self.window else 0.0


def device_spans(events: Iterable[Mapping[str, Any]], *, device: str) -> list[Span]:
    """Return the work of the device: kernels and copies of a GPU; on the CPU operators, each without those it calls."""
    complete = [event for event in events if event.get("ph") == "X"]
    if device == "cuda":
        return [_span(event) for event in complete if event.get("cat") in _DEVICE_CATEGORIES]
    threads: dict[Any, list[Span]] = defaultdict(list)
    for event in complete:
        if event.get("cat") == "cpu_op":
            threads[event.get("tid")].append(_span(event))
    return [span for spans in threads.values() for span in _own_time(spans)]


def _span(event: Mapping[str, Any]) -> Span:
    start = float(event["ts"])
    return Span(str(event["name"]), start, start + float(event.get("dur", 0.0)))


def _own_time(spans: Sequence[Span]) -> list[Span]:
    """Cut the spans of one thread into the pieces in which no span inside them runs."""
    pieces: list[Span] = []
    running: list[Span] = []
    now = 0.0

    def advance(until: float) -> None:
        nonlocal now
        while running and running[-1].end <= until:
            span = running.pop()
            if span.end > now:
                pieces.append(Span(span.name, now, span.end))
                now = span.end
        if running and until > now:
            pieces.append(Span(running[-1].name, now, until))
        now = max(now, until)

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        advance(span.start)
        running.append(span)
    advance(float("inf"))
    return pieces


def stillness(spans: Sequence[Span]) -> Stillness:
    """Measure the pauses between ``spans``, whatever stream they are on."""
    if not spans:
        return Stillness(0.0, 0.0, 0, ())
    ordered = sorted(spans, key=lambda span: span.start)
    last, busy, gaps = ordered[0], ordered[0].length, []
    for span in ordered[1:]:
        if span.start > last.end:
            gaps.append(Gap(span.start - last.end, after=last.name, before=span.name))
        if span.end > last.end:
            busy += span.end - max(span.start, last.end)
            last = span
    long = [gap for gap in gaps if gap.length > GAP_US]
    longest = heapq.nlargest(_SHOWN_GAPS, long, key=lambda gap: gap.length)
    return Stillness(last.end - ordered[0].start, busy, len(long), tuple(longest))


def time_by_class(spans: Iterable[Span]) -> dict[str, float]:
    """Return microseconds of work by class, every class named."""
    totals = dict.fromkeys(CLASSES, 0.0)
    for span in spans:
        totals[class_of(span.name)] += span.length
    return totals


def longest_kernels(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Return the kernels that took most time together: class, name, how many, microseconds."""
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for span in spans:
        times[span.name] += span.length
        counts[span.name] += 1
    return [
        {"class": class_of(name), "name": name[:_NAME_LENGTH], "count": counts[name], "microseconds": round(time, 1)}
        for name, time in heapq.nlargest(_SHOWN_KERNELS, times.items(), key=lambda item: item[1])
    ]


def host_waits(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """Return how often the host waited for the device, and for how many microseconds, by call.

    Copies from the device count too: into pageable memory they make the host wait.
    """
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("ph") != "X":
            continue
        name, category = str(event["name"]), event.get("cat")
        if category in _HOST_CATEGORIES and name in HOST_WAITS:
            key = name
        elif category == "gpu_memcpy" and name.startswith(TO_HOST):
            key = TO_HOST
        else:
            continue
        count, time = found.get(key, (0, 0.0))
        found[key] = (count + 1, time + float(event.get("dur", 0.0)))
    return found


def breakdown(events: Sequence[Mapping[str, Any]], *, device: str, steps: int) -> dict[str, Any]:
    """Return what the profile of ``steps`` steps says about one step, as plain values.

    Milliseconds are per step. Shares of classes are of the time of all kernels, which is longer than the busy time
    where streams overlap.
    """
    spans = device_spans(events, device=device)
    times, still = time_by_class(spans), stillness(spans)
    total = sum(times.values())
    return {
        "steps": steps,
        "problem": None if spans else "the profiler recorded no kernel",
        "milliseconds": {name: time / steps / 1e3 for name, time in times.items()},
        "shares": {name: time / total if total else 0.0 for name, time in times.items()},
        "window_milliseconds": still.window / steps / 1e3,
        "busy_milliseconds": still.busy / steps / 1e3,
        "idle_share": still.idle_share,
        "gaps_over_10_us": still.gaps / steps,
        "longest_gaps": [
            {"microseconds": gap.length, "after": gap.after[:_NAME_LENGTH], "before": gap.before[:_NAME_LENGTH]}
            for gap in still.longest
        ],
        "host_waits": {
            name: {"calls": count / steps, "milliseconds": time / steps / 1e3}
            for name, (count, time) in sorted(host_waits(events).items())
        },
        "kernels": longest_kernels(spans),
    }
