"""Count on the CPU what would make a GPU wait for the host, or the host for a GPU.

Two views are joined. Every operator is seen below autograd, in the backward pass too: those whose result's shape or
value has to be known on the host carry a tag. What reads the memory of a CPU tensor without an operator (``tolist``,
``numpy``), copies that block, and waits for events are seen as calls from Python.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PACKAGES = ("/mm15_megatron/", "/megatron/core/")
_READS = ("tolist", "numpy", "cpu", "__array__")
_COPIES = ("to", "new_tensor", "tensor", "as_tensor", "asarray")
_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Read:
    """One of them.

    Attributes:
        what: the operator (``masked_select``), the method (``tolist``), ``copy`` or ``synchronize``.
        where: the innermost function of this package or of megatron-core, as ``attention.py:packed_rows``.
        path: every such function outwards, in the same form.
        caller: the innermost function outside torch's dispatch, in the same form.
    """

    what: str
    where: str
    path: tuple[str, ...]
    caller: str


def _name(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"


def _read(what: str) -> Read:
    frame: FrameType | None = sys._getframe(2)
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    inner = ("_python_dispatch.py", "_compile.py", "eval_frame.py", "_device.py")
    outside = [f for f in frames if not f.f_code.co_filename.endswith(inner)]
    path = [_name(f) for f in frames if any(package in f.f_code.co_filename for package in _PACKAGES)]
    return Read(what, path[0] if path else "", tuple(path), _name(outside[0]))


class _Operators(TorchDispatchMode):
    """Operators whose shape or value the host has to know."""

    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks_the_device(func, args, kwargs):
            self.reads.append(_read(func.overloadpacket.__name__))
        return func(*args, **kwargs)


def _asks_the_device(func: Any, args: Any, kwargs: Any) -> bool:
    name = func.overloadpacket.__name__
    if name.startswith(("index", "_index", "_unsafe_index")):  # by a mask, which becomes positions first
        masks = [i for group in args if isinstance(group, (list, tuple)) for i in group if isinstance(i, torch.Tensor)]
        # One value written through a mask is a masked_fill, which needs no positions (megatron-core's embedding).
        return any(i.dtype in _MASKS for i in masks) and not ("put" in name and args[2].numel() == 1)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags))


def _waits(name: str, args: Any, kwargs: Any) -> str | None:
    """What a call from Python does to the queue, or None: a copy that says ``non_blocking`` waits for nothing."""
    if name not in _COPIES:
        return name
    names_device = kwargs.get("device") is not None or any(isinstance(a, (torch.device, str)) for a in args[1:])
    return "copy" if names_device and not kwargs.get("non_blocking", False) else None


@contextmanager
def host_reads() -> Iterator[list[Read]]:
    """Collect the reads of everything that runs inside, in order; ``parallel.device=cpu`` must be set up.

    What runs is not changed: calls are noted and handed on. The CPU's stand-ins for events and streams wait for
    nothing, and say here that a GPU would.
    """
    reads: list[Read] = []

    def noted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            if what := _waits(name, args, kwargs):
                reads.append(_read(what))
            return plain(*args, **kwargs)

        return call

    places = [(torch.Tensor, name) for name in (*_READS, "to", "new_tensor")]
    places += [(torch, name) for name in ("tensor", "as_tensor", "asarray")]
    places += [(torch.cuda.Event, "synchronize"), (torch.cuda, "synchronize")]
    with ExitStack() as stack, _Operators(reads):
        for owner, name in places:
            plain = getattr(owner, name)
            stack.callback(setattr, owner, name, plain)
            setattr(owner, name, noted(name, plain))
        yield reads
