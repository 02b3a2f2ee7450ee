"""CUDA graphs of the parts of a layer that have the same shapes in every micro-batch.

megatron-core decides what of a layer is captured and in which order of micro-batches, Transformer Engine captures. Of
our layers that is the feed-forward block of a dense decoder layer. Attention reads the bounds of packed segments, and a
sparse block the padding of its rows and buffers of its experts' loads: a graph would keep those of the micro-batch it
was captured in. Tiles come in a number of their own in every micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError


class LayerGraphs:
    """Captures ``kernels.cuda_graph_scope`` of this rank's chunks once they are warm, and has it replayed from then on.

    The first ``kernels.cuda_graph_warmup_steps`` steps after a start or a resume run without graphs. Inputs and outputs
    of the graphs stay allocated: one set for each micro-batch that a pipeline holds at a time.
    """

    def __init__(self, cfg: RunConfig, chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer) -> None:
        """Find the layers; nothing is captured yet.

        Raises:
            BackendError: the allocator's settings and NCCL's would corrupt the graphs' memory, or a rank has no layer
                that can be captured. Every rank must call.
        """
        settings = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        expandable = [name for name in settings if "expandable_segments:True" in os.environ.get(name, "")]
        if expandable and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            raise BackendError(
                f"kernels.cuda_graph_scope with {expandable[0]}={os.environ[expandable[0]]}: NCCL registers the "
                "graphs' buffers, and expandable segments may move them",
                fix="set NCCL_GRAPH_REGISTER=0 in the environment, or leave expandable_segments off",
            )
        self.chunks = list(chunks)
        self.hooks = cfg.parallel.overlap_param_gather
        self.eager_steps = cfg.kernels.cuda_graph_warmup_steps
        self.helper = TECudaGraphHelper(
            model=self.chunks,
            config=self.chunks[0].module.config,
            # Rows of a micro-batch lie end to end, and context parallelism is ours: these are the tokens of a rank.
            seq_length=cfg.data.seq_length * cfg.train.micro_batch_size // cfg.parallel.context_parallel_size,
            micro_batch_size=1,
            optimizers=[optimizer],
        )
        check_every_rank(layers=len(self.helper.flattened_callables))

    def before_step(self, *, num_microbatches: int) -> None:
        """Count a step down, or capture before it; gradients of the layers are zero afterwards."""
        if self.eager_steps > 0:
            self.eager_steps -= 1
            return
        if self.helper.graphs_created():
            return
        hooks = self.hooks and all(chunk.remove_forward_pre_hook_handles for chunk in self.chunks)
        if hooks:  # collectives of the data-parallel group must not become part of a graph
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=False)
        with known_microbatches(num_microbatches):
            self.helper.create_cudagraphs()
        if hooks:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()
            self.helper.cuda_graph_set_manual_hooks()

    def close(self) -> None:
        """Destroy the graphs, which hold communicators: before the process groups are left."""
        if self.helper.graphs_created():
            torch.cuda.synchronize()
            self.helper.delete_cuda_graphs()


def check_every_rank(*, layers: int) -> None:
    """Refuse graphs where a rank has ``layers`` = 0 to capture; every rank must call.

    Raises:
        BackendError: on every rank alike.
    """
    fewest = torch.tensor(layers, device=torch.cuda.current_device())
    torch.distributed.all_reduce(fewest, op=torch.distributed.ReduceOp.MIN)
    if fewest.item() == 0:
        raise BackendError(
            "kernels.cuda_graph_scope: a pipeline rank holds no dense layer, and megatron-core captures on every rank "
            "together",
            fix="use fewer pipeline stages, or set kernels.cuda_graph_scope=[]",
        )


@contextmanager
def known_microbatches(count: int) -> Iterator[None]:
    """Tell megatron-core's global counter, which the capture asks."""
    init_num_microbatches_calculator(
        rank=torch.distributed.get_rank(),
        rampup_batch_size=None,
        global_batch_size=count,
        micro_batch_size=1,
        data_parallel_size=1,
    )
    try:
        yield
    finally:
        unset_num_microbatches_calculator()
