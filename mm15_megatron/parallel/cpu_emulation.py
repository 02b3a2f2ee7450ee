"""Let megatron-core run on the CPU: an explicit opt-in, used by ``parallel.device=cpu`` alone.

megatron-core 0.16 asks torch.cuda for a device, a stream, a random-number state and a tensor type in many places.
``install`` answers those calls for a machine without a GPU; arithmetic is not touched, so the real layers, schedules
and optimizers run. Nothing is installed when CUDA is used, and installing beside a working GPU is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mm15_megatron.errors import BackendError

_CPU = torch.device("cpu")
_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
)
_INERT = ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "ipc_collect")


class _InertStream:
    """Stands in for a CUDA stream or event: on one queue there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = _CPU

    def wait_stream(self, stream: object) -> None:
        """Do nothing."""

    def wait_event(self, event: object) -> None:
        """Do nothing."""

    def record_event(self, event: object = None) -> _InertStream:
        """Return an event that has already happened."""
        return self

    def record(self, stream: object = None) -> None:
        """Do nothing."""

    def wait(self, stream: object = None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Report that all work is done."""
        return True

    def synchronize(self) -> None:
        """Do nothing."""


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Send a tensor factory that names a CUDA device to the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


@contextmanager
def _inert_context(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def is_installed() -> bool:
    """Whether this process emulates."""
    return bool(getattr(torch.cuda, "mm15_cpu_emulation", False))


def install() -> None:
    """Patch torch.cuda and the few megatron-core functions that cannot run without it; doing it twice does nothing.

    Raises:
        BackendError: if CUDA works here: the emulation would hide it.
    """
    if is_installed():
        return
    if torch.cuda.is_available():
        raise BackendError(
            "parallel.device = cpu was asked for on a machine with a working CUDA device",
            fix="set parallel.device=cuda, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
        )
    _patch_devices()
    _patch_random_state()
    _patch_tensors()
    _patch_megatron()
    torch.cuda.mm15_cpu_emulation = True  # type: ignore[attr-defined]


def _patch_devices() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    cuda.device_count = lambda: 1
    for name in _INERT:
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.Stream = cuda.Event = _InertStream  # type: ignore[assignment,misc]
    cuda.current_stream = cuda.default_stream = lambda device=None: _InertStream()  # type: ignore[assignment,return-value]
    cuda.stream = _inert_context  # type: ignore[assignment]
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: 0  # type: ignore[assignment]


def _patch_random_state() -> None:
    """The CPU generator plays the role of the CUDA generator."""
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state  # type: ignore[attr-defined,assignment]
        module.manual_seed = torch.default_generator.manual_seed  # type: ignore[attr-defined,assignment]
        module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined,assignment]  # torch.manual_seed calls it
    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state


def _patch_tensors() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    plain_type = torch.Tensor.type

    def type_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core's optimizers compare type strings with 'torch.cuda.FloatTensor' and the like.
        answer = plain_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_or_cast  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def _patch_megatron() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # defined by megatron-core only where Transformer Engine imports
    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu

    @functools.wraps(to_cpu)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # A tensor already on the CPU is returned as it is; all_to_all_single then refuses tensors as split sizes.
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move
    _patch_uneven_collectives()


def _patch_uneven_collectives() -> None:
    """gloo gathers equal shapes only; split experts gather as many tokens as each rank was sent."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_any(
        input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        mine = input_.new_zeros(longest, *input_.shape[1:])
        mine[: input_.shape[0]] = input_
        parts = [torch.empty_like(mine) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, mine, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_any(
        input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any
