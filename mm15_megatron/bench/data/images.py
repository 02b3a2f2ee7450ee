"""The cases ``images`` and ``tiles``: pictures a second a core, beside Pillow and OpenCV."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version

import torch

from mm15_megatron.bench.data.image_paths import (
    OPENCV,
    OURS,
    PILLOW,
    Path,
    TileRule,
    opencv_path,
    opencv_version,
    our_path,
    pillow_path,
)
from mm15_megatron.bench.data.outcome import CaseResult, Comparison, Request
from mm15_megatron.bench.data.pictures import PHOTO_QUALITY, SCREEN_QUALITY, Picture, photo_set, photographs, screen_set
from mm15_megatron.bench.data.turns import Seconds, in_turn, times_as_fast
from mm15_megatron.config.schema import TilingConfig, VisionConfig
from mm15_megatron.errors import BackendError

UNIT = "pictures a second of a core"
_SETS = ("photo", "screenshot")


def images(request: Request) -> CaseResult:
    """One tile of 378 from each picture."""
    rule = TileRule(VisionConfig(image_size=378), TilingConfig())
    does = "decode, resize to 378 x 378 (stretched), normalise to float32"
    return _compare(request, rule, does=does, targets={PILLOW: 1.6, OPENCV: 1.0})


def tiles(request: Request) -> CaseResult:
    """An overview and 2 x 2 tiles of 672 from each picture."""
    rule = TileRule(VisionConfig(image_size=672), TilingConfig(mode="static"))
    does = "decode once, resize to 672 x 672 and 1344 x 1344 (stretched), normalise to float32, cut into 5 tiles of 672"
    return _compare(request, rule, does=does, targets={PILLOW: 1.15})


def _compare(request: Request, rule: TileRule, *, does: str, targets: Mapping[str, float]) -> CaseResult:
    sources, names = photographs(request.pictures)
    groups = photo_set(sources) | screen_set(request.pictures)
    paths, skipped, versions = {OURS: our_path(rule), PILLOW: pillow_path(rule)}, {}, {}
    try:
        paths[OPENCV], versions["opencv"] = opencv_path(rule), opencv_version()
    except BackendError as error:
        skipped[OPENCV] = error.problem
    work = {
        name: {who: partial(_consume, run, pictures) for who, run in paths.items()} for name, pictures in groups.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = in_turn(work, rounds=request.rounds)
    finally:
        torch.set_num_threads(threads)
    per_group, details = _by_group(found, groups, paths)
    comparisons = [
        _comparison(f"{kind}s", [name for name in groups if name.startswith(kind)], found, groups, peer, targets)
        for peer in paths
        if peer != OURS
        for kind in _SETS
    ]
    return CaseResult(
        work=(*_work(does, names, screens=request.pictures), _agreement(rule, groups, paths)),
        comparisons=(*comparisons, *per_group),
        skipped=skipped,
        versions={"scikit-learn": version("scikit-learn"), **versions},
        details=details,
    )


def _work(does: str, names: Sequence[str], *, screens: int) -> tuple[str, ...]:
    return (
        f"Every contender does: {does}; one thread, one core. Ours is the loader's path (DALI decodes eight pictures "
        "at a time, torch resizes and normalises); Pillow decodes and resizes with its bicubic filter, OpenCV decodes "
        "and resizes with INTER_AREA, and torch normalises for both.",
        f"Photographs: {', '.join(names)}, continued by mirror images to each size, JPEG quality {PHOTO_QUALITY}, "
        f"4:2:0. Screenshots: {screens} drawn ones of each size, PNG and JPEG quality {SCREEN_QUALITY}.",
        "A rate is pictures divided by the seconds that the process occupied a core; a set's is over all its sizes, as "
        "many pictures of each.",
    )


def _consume(run: Path, pictures: Sequence[Picture]) -> None:
    """Make the tiles of pictures, and keep none."""
    for _ in run(pictures):
        pass


def _comparison(
    what: str,
    names: Sequence[str],
    found: Mapping[str, Mapping[str, Sequence[Seconds]]],
    groups: Mapping[str, Sequence[Picture]],
    peer: str,
    targets: Mapping[str, float],
) -> Comparison:
    """Put ours beside ``peer`` over the groups called ``names``."""
    count = sum(len(groups[name]) for name in names)
    rounds = range(len(found[names[0]][OURS]))
    ours, theirs = ([sum(found[name][who][r].core for name in names) for r in rounds] for who in (OURS, peer))
    return Comparison(
        what=what,
        unit=UNIT,
        peer=peer,
        ours=count / statistics.median(ours),
        theirs=count / statistics.median(theirs),
        ratio=times_as_fast(ours, theirs),
        at_least=targets.get(peer),
    )


def _by_group(
    found: Mapping[str, Mapping[str, Sequence[Seconds]]],
    groups: Mapping[str, Sequence[Picture]],
    paths: Mapping[str, Path],
) -> tuple[list[Comparison], dict[str, object]]:
    """Each size and format by itself, and its milliseconds a picture with the bytes of a file."""
    rows = [_comparison(name, [name], found, groups, peer, {}) for name in groups for peer in paths if peer != OURS]
    details = {
        name: {
            "pictures": len(pictures),
            "kilobytes_a_picture": round(sum(len(one.encoded) for one in pictures) / len(pictures) / 1000, 1),
            "core_milliseconds_a_picture": {
                who: [round(1000 * s.core / len(pictures), 3) for s in found[name][who]] for who in paths
            },
            "wall_milliseconds_a_picture": {
                who: [round(1000 * s.wall / len(pictures), 3) for s in found[name][who]] for who in paths
            },
        }
        for name, pictures in groups.items()
    }
    return rows, {"groups": details}


def _agreement(rule: TileRule, groups: Mapping[str, Sequence[Picture]], paths: Mapping[str, Path]) -> str:
    """Say how far the tiles of the first picture of each group are from Pillow's."""
    worst = {who: 0.0 for who in paths if who != PILLOW}
    for pictures in groups.values():
        reference = next(paths[PILLOW](pictures[:1]))
        for who in worst:
            worst[who] = max(worst[who], rule.levels(next(paths[who](pictures[:1])) - reference))
    said = ", ".join(f"{who} {levels:.1f}" for who, levels in worst.items())
    return f"Largest difference of a pixel from Pillow's, in levels of 255 (first picture of each group): {said}."
