"""Random-number states of a run.

Weights are a function of (seed, parameter name) and the data order of (seed, mixture, row), so these states serve only
what megatron-core draws by itself (recomputation contexts, dropout if ever switched on).
"""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mm15_megatron.parallel.topology import Topology


def seed_everything(seed: int, *, topology: Topology) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker; stages differ, data-parallel replicas do not."""
    stage_seed = seed + 100 * topology.pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
