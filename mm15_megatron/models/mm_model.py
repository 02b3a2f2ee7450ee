"""The multimodal model: ViT encoder -> connector -> decoder LLM, one pipeline stage of it.

T: tokens of the packed row (R rows of S end to end); N: tiles of this rank; P: slots of a tile; H: language width;
V: this rank's share of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mm15_megatron.accounting import chunk_layers, padded_vocab_size, sparse_layers
from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import DataError
from mm15_megatron.models.attention import packed_rows
from mm15_megatron.models.backend import Backend
from mm15_megatron.models.connector import build_connector
from mm15_megatron.models.image_merge import merge_image_tokens
from mm15_megatron.models.layer_specs import block_spec, dense_layer_spec, sparse_layer_spec
from mm15_megatron.models.rope import rotary_table, rotation
from mm15_megatron.models.router import RoutingRules
from mm15_megatron.models.router_ledger import RouterLedger
from mm15_megatron.models.schedule_plan import ChunkPlan
from mm15_megatron.models.transformer_config import language_transformer_config
from mm15_megatron.models.vision_encoder import VisionEncoder


class Stage(Protocol):
    """What a model chunk has to know about its place in the layout (``parallel.topology.Topology`` is one).

    Attributes:
        groups: megatron-core's process groups.
        encoder_groups: the groups the encoder is built on.
        position: place of the chunk in the forward pass: which of the virtual pipeline stages it is.
        virtual_rank: which of its rank's chunks it is; None without interleaving.
        is_first_stage: the chunk embeds tokens and encodes images.
        is_last_stage: the chunk ends with the output layer.
        encoder_shares_tiles: each tensor-parallel rank encodes a share of the tiles.
        own_tokens: cuts this rank's tokens out of a tensor over the whole micro-batch.
    """

    @property
    def groups(self) -> ProcessGroupCollection: ...  # noqa: D102
    @property
    def encoder_groups(self) -> ProcessGroupCollection: ...  # noqa: D102
    @property
    def position(self) -> int: ...  # noqa: D102
    @property
    def virtual_rank(self) -> int | None: ...  # noqa: D102
    @property
    def is_first_stage(self) -> bool: ...  # noqa: D102
    @property
    def is_last_stage(self) -> bool: ...  # noqa: D102
    @property
    def encoder_shares_tiles(self) -> bool: ...  # noqa: D102
    def own_tokens(self, whole_T: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


class MM15Model(MegatronModule):
    """One chunk of the model.

    ``forward`` takes an :class:`MMBatch` and returns logits [1, T, V] on the last stage, hidden states [T, 1, H] (this
    rank's sequence shard under sequence parallelism) on the others.
    """

    def __init__(self, cfg: RunConfig, *, backend: Backend, stage: Stage) -> None:
        config = language_transformer_config(cfg)
        super().__init__(config)
        language = cfg.language
        self.model_type = ModelType.encoder_or_decoder
        self.stage = stage
        self.pre_process, self.post_process = stage.is_first_stage, stage.is_last_stage
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        self.tensor_group, self.context_group = stage.groups.tp, stage.groups.cp
        self.vp_stage = stage.virtual_rank  # megatron-core's schedules look for it
        layers = chunk_layers(cfg)[stage.position]
        self.first_layer = layers.start
        self.first_expert = stage.groups.ep.rank() * (cfg.moe.num_moe_experts // stage.groups.ep.size())
        self.rotary_base, self.head_dim = language.rotary_base, language.kv_channels
        self.rotation = rotation(compiled=cfg.kernels.compile_fusions)
        self.encoder_is_frozen = cfg.freeze.vision
        if self.pre_process:
            self.vision_encoder = VisionEncoder(cfg, backend=backend, groups=stage.encoder_groups)
            self.connector = build_connector(cfg, linear=backend.linear)
            if stage.encoder_shares_tiles:
                clear_tensor_parallel_marks(self.vision_encoder)
        self.router_ledger = router_ledger(cfg, layers)
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=decoder_block(cfg, layers, backend=backend, stage=stage, ledger=self.router_ledger),
            vocab_size=padded_vocab_size(cfg),
            max_sequence_length=cfg.data.seq_length,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            pg_collection=stage.groups,
            vp_stage=stage.virtual_rank,
        )
        self._freeze(cfg)

    def _freeze(self, cfg: RunConfig) -> None:
        frozen = [self.language_model] if cfg.freeze.language else []
        if self.pre_process:
            frozen += [self.vision_encoder] if cfg.freeze.vision else []
            frozen += [self.connector] if cfg.freeze.connector else []
        for module in frozen:
            module.requires_grad_(False)

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor) -> None:
        """Receive the previous stage's hidden states (called by megatron-core's schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the tied weight of this stage (megatron-core sums its gradient over the first and the last stage)."""
        return self.language_model.shared_embedding_or_output_weight()

    def image_tokens(self, batch: MMBatch) -> torch.Tensor:
        """Encode this rank's tiles and return the tokens of all tiles of the micro-batch, [N, P, H].

        With a shared encoder every tensor- and context-parallel rank encodes the same number of tiles and the tokens
        are gathered; ``parallel/reduce.py`` sums the encoder's gradients over the tensor-parallel group afterwards.
        """
        if batch.tiles_N3HW is None or batch.slots_NP is None:
            raise DataError(
                "a micro-batch without tiles or slots reached the encoder", fix="build it with reads_images=True"
            )
        with torch.no_grad() if self.encoder_is_frozen else nullcontext():
            features = self.vision_encoder(batch.tiles_N3HW)
        tokens_NPH = self.connector(features)
        if self.stage.encoder_shares_tiles:
            # Tensor-parallel ranks use all tokens alike, so each takes its slice of the gradient; context-parallel
            # ranks use different ones, so theirs are summed.
            tokens_NPH = gather_from_sequence_parallel_region(
                tokens_NPH.contiguous(), tensor_parallel_output_grad=False, group=self.tensor_group
            )
            tokens_NPH = gather_from_sequence_parallel_region(tokens_NPH, group=self.context_group)
        return tokens_NPH[: batch.slots_NP.shape[0]]

    @property
    def module(self) -> GPTModel:
        """The decoder, where megatron-core's schedules look for the ``GPTModel`` whose plan they run."""
        return self.language_model

    def forward(self, batch: MMBatch) -> torch.Tensor:
        """Run this stage on one micro-batch."""
        return self.language_model(input_ids=None, position_ids=None, attention_mask=None, **self._inputs(batch))

    def schedule_plan(self, batch: MMBatch) -> ChunkPlan:
        """Encode the images of one micro-batch and plan the rest (``overlap_moe_expert_parallel_comm``).

        The plan's last backward node is that of the merged input, so encoder and connector get their gradient.
        """
        return ChunkPlan(
            self.language_model, input_ids=None, position_ids=None, attention_mask=None, **self._inputs(batch)
        )

    def _inputs(self, batch: MMBatch) -> dict[str, Any]:
        """What the decoder is called with."""
        rotary = rotary_table(
            self.stage.own_tokens(batch.position_ids_T),
            head_dim=self.head_dim,
            base=self.rotary_base,
            rotation=self.rotation,
        )
        rows = packed_rows(batch.segment_bounds_G, max_segment=batch.max_segment, rotary=rotary)
        return {
            "decoder_input": self._embed(batch) if self.pre_process else None,
            "packed_seq_params": rows,
            "padding_mask": self._padding(batch) if self.router_ledger.layers else None,
        }

    def _padding(self, batch: MMBatch) -> torch.Tensor:
        """Padding of the tokens whose hidden states this rank holds, bool [1, T]."""
        mask_T = self.stage.own_tokens(batch.padding_mask_T)
        if self.config.sequence_parallel:
            mask_T = mask_T.chunk(self.tensor_group.size())[self.tensor_group.rank()]
        return mask_T[None]

    def _embed(self, batch: MMBatch) -> torch.Tensor:
        if batch.tokens_T is None:
            raise DataError("a micro-batch without tokens reached the first stage", fix="keep tokens_T on stage 0")
        # Images first: parameters are gathered ahead in the order in which modules were registered.
        tokens_NPH = self.image_tokens(batch)
        text_T1H = self.language_model.embedding(input_ids=batch.tokens_T[None], position_ids=None)
        merged_T1H = self.stage.own_tokens(merge_image_tokens(text_T1H, tokens_NPH, batch.slots_NP))
        if self.config.sequence_parallel:
            merged_T1H = scatter_to_sequence_parallel_region(merged_T1H, group=self.tensor_group)
        return merged_T1H


def router_ledger(cfg: RunConfig, layers: Iterable[int]) -> RouterLedger:
    """The books of the sparse layers among ``layers`` (global indices)."""
    sparse = sparse_layers(cfg)
    return RouterLedger(
        [layer for layer in layers if sparse[layer]],
        experts=cfg.moe.num_moe_experts,
        device=torch.cuda.current_device(),
    )


def routing_rules(cfg: RunConfig) -> RoutingRules:
    """How the sparse layers of a run route; capacity is ceil(group tokens x top-k / experts x factor)."""
    moe, factor = cfg.moe, cfg.moe.moe_expert_capacity_factor
    share = moe.moe_capacity_group_size * moe.moe_router_topk / moe.num_moe_experts
    return RoutingRules(
        topk=moe.moe_router_topk,
        row_length=cfg.data.seq_length,
        balance_loss=moe.moe_router_load_balancing_type,
        balance_coeff=moe.moe_aux_loss_coeff,
        z_coeff=moe.moe_z_loss_coeff,
        capacity=None if factor is None else math.ceil(share * factor),
        group_size=moe.moe_capacity_group_size,
        drop_policy=moe.moe_token_drop_policy,
    )


def decoder_block(
    cfg: RunConfig, layers: Iterable[int], *, backend: Backend, stage: Stage, ledger: RouterLedger
) -> TransformerBlockSubmodules:
    """The decoder layers of one chunk (global indices), dense and sparse."""
    sparse = sparse_layers(cfg)
    dense = dense_layer_spec(
        backend,
        mask=AttnMaskType.causal,
        qk_layernorm=cfg.language.qk_layernorm,
        exchanges_heads=stage.groups.cp.size() > 1,
    )
    specs = []
    for layer in layers:
        if sparse[layer]:
            specs.append(
                sparse_layer_spec(backend, dense, rules=routing_rules(cfg), ledger=ledger, groups=stage.groups)
            )
        else:
            specs.append(dense)
    return block_spec(backend, specs)


def clear_tensor_parallel_marks(module: torch.nn.Module) -> None:
    """Make a module that is whole on every tensor-parallel rank look replicated, so that norms count it once."""
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
