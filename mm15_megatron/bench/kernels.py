"""Which class of work a kernel belongs to, by its name: cuBLAS, cuDNN, Transformer Engine, torch, Triton and NCCL.

The first class with a pattern that occurs in the name wins. On the CPU the same table sorts torch's operators.
"""

from __future__ import annotations

import re

MATRIX = "matrix products"
ATTENTION = "attention"
NORMS = "norms and elementwise"
OPTIMIZER = "optimizer"
MOE = "expert permutation and indexing"
FP8_CASTS = "FP8 casts"
COPIES = "copies, casts and fills"
COMMUNICATION = "communication"
OTHER = "other"

_PATTERNS: tuple[tuple[str, str], ...] = (
    (COMMUNICATION, r"nccl|multimem_all|^c10d::|gloo:|ncclDevKernel"),
    (ATTENTION, r"flash_|FlashAttn|fmha|sdpa|fused_attn|scaled_dot_product|context_parallel::thd|varlen_attn"),
    (FP8_CASTS, r"multi_tensor_compute_scale|float8_copy"),
    (OPTIMIZER, r"multi_tensor_apply_kernel|aten::_foreach|aten::_fused_adam|[aA]dam[A-Z]"),
    (
        MOE,
        r"moe_permute|moe_unpermute|_permute_kernel|_unpermute_(kernel|bwd)|row_id_map|sort_chunks|chunk_sort_map|"
        r"fused_topk_with|moe_aux_loss|multi_(un)?padding|[rR]adixSort|bitonicSort|gatherTopK|[tT]op_?[kK]\b|"
        r"index_?[sS]elect|indexFunc|index_elementwise|index_put|index_copy|index_kernel|indexing_backward|"
        r"scatter_gather|scatter_add|masked_select|gather_kernel|embedding|compute_cuda_kernel|"
        r"aten::(index|gather|scatter|sort|argsort|bincount|histc|nonzero|repeat_interleave)",
    ),
    (
        FP8_CASTS,
        r"transformer_engine::.*(cast|quantize|amax|scaling|swizzle|transpose|compute_scale|scale_inv|hadamard)",
    ),
    (COPIES, r"nchwToNhwc|nhwcToNchw"),
    (
        MATRIX,
        r"nvjet|gemm|GEMM|Gemm|gemv|cutlass|cublas|splitKreduce|xmma|triton_tem|convolve|conv_depthwise|conv2d|dgrad|"
        r"wgrad|fprop|dot_kernel|aten::(mm|addmm|bmm|baddbmm|dot|mkldnn_convolution|convolution|_convolution|thnn_conv2d|"
        r"convolution_backward|_slow_conv2d_forward|_slow_conv2d_backward|mkldnn_linear|linear)$",
    ),
    (
        COPIES,
        r"Memcpy|Memset|memset_kernel|copy_kernel|CatArray|FillFunctor|transpose|"
        r"aten::(copy_|cat|fill_|zero_|clone|contiguous|_to_copy|stack)$",
    ),
    (
        NORMS,
        r"[nN]orm|elementwise|reduce_kernel|[sS]oft_?[mM]ax|triton_|unary_(grad_)?kernel|gated_act|rope|dropout|silu|"
        r"gelu|scan|cumsum|reduce_dbias|aten::(add|sub|mul|div|neg|pow|exp|log|sqrt|rsqrt|sin|cos|sum|mean|amax|max|"
        r"min|where|clamp|sigmoid|relu|square|eq|ne|gt|lt|ge|le|logical|bitwise|masked_fill|cumsum|_log_softmax|outer|"
        r"reciprocal|lerp|addcmul|addcdiv|var|abs|isfinite|randn|normal|logsumexp|bernoulli)",
    ),
)
_TABLE = tuple((name, re.compile(pattern)) for name, pattern in _PATTERNS)

CLASSES = (MATRIX, ATTENTION, NORMS, OPTIMIZER, MOE, FP8_CASTS, COPIES, COMMUNICATION, OTHER)
"""Every class, in the order of a report."""


def class_of(kernel: str) -> str:
    """Return the class of the kernel or operator called ``kernel``."""
    return next((name for name, pattern in _TABLE if pattern.search(kernel)), OTHER)
