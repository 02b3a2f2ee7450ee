"""Kernel names as cuBLAS, cuDNN, Transformer Engine, torch, Triton and NCCL have them, and the class of each."""

from __future__ import annotations

import pytest

from mm15_megatron.bench.kernels import (
    ATTENTION,
    CLASSES,
    COMMUNICATION,
    COPIES,
    FP8_CASTS,
    MATRIX,
    MOE,
    NORMS,
    OPTIMIZER,
    OTHER,
    class_of,
)

NATIVE = "void at::native::"
TE = "void transformer_engine::"

NAMES = {
    MATRIX: (
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_qqtst_128x256_128x6_2x1_v_bz_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x128_warpgroupsize1x1x1_kernel__5x_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<>>>",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_nn_align8>",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
        f"{NATIVE}(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4>",
        "triton_tem_fused_mm_0",
        "aten::mm",
    ),
    ATTENTION: (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4, false, false>>",
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<80, 128, 64, 4, false, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128>>",
        "void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<>>>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
        f"{TE}fused_attn::get_runtime_num_segments_kernel(int*, int*, unsigned long, unsigned int*)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    NORMS: (
        f"{TE}normalization::rmsnorm_fwd_tuned_kernel<normalization::Kernel_traits<__nv_bfloat16>>",
        f"{TE}normalization::ln_bwd_finalize_tuned_kernel<normalization::Kernel_traits_finalize<1280>>",
        f"{TE}gated_act_kernel<32, __nv_bfloat16, float, __nv_bfloat16, Empty>",
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor<float>>>",
        f"{NATIVE}(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
        f"{NATIVE}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, sum_functor>>>",
        f"{NATIVE}(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>",
        "triton_poi_fused_mul_silu_0",
        "triton_red_fused_add_exp_sub_sum_1",
        "aten::mul",
    ),
    OPTIMIZER: (
        "void multi_tensor_apply_kernel<TensorListMetadata<5, false>, "
        "transformer_engine::multi_tensor_adam::AdamFunctorMaster<__nv_bfloat16, float>>",
        "void multi_tensor_apply_kernel<TensorListMetadata<1, false>, "
        "transformer_engine::multi_tensor_l2norm::L2NormFunctor<float>>",
        f"{NATIVE}(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
        "at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, (at::native::ADAM_MODE)1, false>>",
        f"{NATIVE}(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float, float>>",
        "aten::_foreach_mul_",
    ),
    MOE: (
        "void moe_permute_kernel<__nv_bfloat16, __nv_bfloat16, 8, true>",
        "_permute_kernel",
        "_unpermute_kernel",
        "_unpermute_bwd_with_merging_probs_kernel",
        "_row_id_map_pass_1_kernel",
        "_sort_chunks_by_map_kernel",
        f"{TE}fused_topk_with_score_function_forward_kernel<float>",
        f"{TE}(anonymous namespace)::multi_padding_kernel<16, 4>",
        f"{NATIVE}(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>",
        f"{NATIVE}_scatter_gather_elementwise_kernel<128, 8>",
        "void cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<cub::DeviceRadixSortPolicy<int, long>>",
        f"{NATIVE}sbtopk::gatherTopK<float, unsigned int, 2, false>",
        "aten::index_select",
    ),
    FP8_CASTS: (
        f"{TE}dispatch::fp8::quantize_2D_kernel::cast_fp8_2D_kernel<false, Empty, __nv_bfloat16, __nv_fp8_e4m3>",
        f"{TE}(anonymous namespace)::block_scaled_1d_cast_transpose_kernel<true, float, __nv_bfloat16, __nv_fp8_e4m3>",
        f"{TE}(anonymous namespace)::multi_cast_transpose_kernel<8, true, float, __nv_bfloat16, __nv_fp8_e4m3>",
        f"{TE}detail::dgated_act_cast_transpose_kernel<8, 8, float, Empty, __nv_bfloat16, __nv_fp8_e5m2>",
        f"{TE}detail::(anonymous namespace)::cast_transpose_general_kernel<8, 8, true, float, __nv_bfloat16>",
        f"{TE}(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>",
        f"{TE}(anonymous namespace)::compute_scale_from_amax_kernel(float const*, float*, float, bool, float)",
        f"{TE}delayed_scaling_recipe::(anonymous namespace)::amax_and_scale_update_impl::kernel_bulk",
        f"{TE}(anonymous namespace)::transpose_general_kernel<8, 8, true, __nv_fp8_e4m3>",
        "void multi_tensor_apply_kernel<TensorListMetadata<3, false>, "
        "transformer_engine::multi_tensor_compute_scale::ComputeScaleAndScaleInvFunctor>",
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::float8_copy_kernel_cuda(at::TensorIteratorBase&)>",
    ),
    COPIES: (
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        f"{NATIVE}unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        f"{NATIVE}(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::OpaqueType<2u>>",
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>",
        "aten::copy_",
    ),
    COMMUNICATION: (
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "c10d::allreduce_",
    ),
    OTHER: ("void something_unheard_of<4>", "spin_kernel"),
}


@pytest.mark.parametrize(("expected", "name"), [(group, name) for group, names in NAMES.items() for name in names])
def test_class_of_a_kernel(expected, name):
    assert class_of(name) == expected


def test_every_class_is_tried():
    assert set(NAMES) == set(CLASSES)
