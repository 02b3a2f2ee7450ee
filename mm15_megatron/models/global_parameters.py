"""Parameters by their global name: one description of what every shard is a shard of.

A layout decides which rank holds which slice; the name and the shape of the whole parameter do not depend on it.
Initial weights, gathered gradients, checkpoints and conversions all read this one description.

Three facts make a shard more than a slice. A stage numbers its layers from zero and a rank its experts, so names carry
the global numbers instead. Experts have tensor- and data-parallel groups of their own. And the first linear layer of a
gated MLP holds [gate; up] on every rank, so its whole is described as [2, ffn, hidden], split along its middle
dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import ProcessGroup

_LAYER = re.compile(r"^(?P<block>.*\.(?:decoder|blocks)\.layers\.)(?P<index>\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.(.*)$")
_GROUPED_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
_SPLIT = {
    "word_embeddings": 0,
    "output_layer": 0,
    "linear_qkv": 0,
    "linear_proj": 1,
    "linear_fc1": 0,
    "linear_fc2": 1,
}
_GATED = ".linear_fc1.weight"
# Transformer Engine keeps a layer norm inside the linear layer that follows it; the global name is the plain one.
_FUSED_NORMS = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)


@dataclass(frozen=True)
class GlobalParameter:
    """One parameter of this rank and the whole it belongs to.

    Attributes:
        name: global name, equal in every layout and backend.
        parameter: the local tensor.
        split_dim: dimension of ``local_view`` that is split over the tensor-parallel group; None = replicated.
        gated: the local tensor is [gate; up] stacked along dimension 0 and viewed as [2, rows, columns].
        tensor_group: the group it is split over (or replicated in).
        data_group: the ranks that hold the same slice.
        tied_copy: a second copy of a parameter that lives on another stage (tied embeddings on the last stage).
    """

    name: str
    parameter: nn.Parameter
    split_dim: int | None
    gated: bool
    tensor_group: ProcessGroup
    data_group: ProcessGroup
    tied_copy: bool = False

    @property
    def is_first_replica(self) -> bool:
        """Whether this is the one rank that speaks for the whole parameter."""
        return self.tensor_group.rank() == 0 and self.data_group.rank() == 0 and not self.tied_copy

    @property
    def shards(self) -> int:
        """Into how many slices the whole is split."""
        return self.tensor_group.size() if self.split_dim is not None else 1

    @property
    def shard_index(self) -> int:
        """Which slice this rank holds."""
        return self.tensor_group.rank() if self.split_dim is not None else 0

    def local_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the parameter's shape (weight, gradient, optimizer state) as a plain slice of the whole."""
        return tensor.view(2, tensor.shape[0] // 2, *tensor.shape[1:]) if self.gated else tensor

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole, in the form of ``local_view``."""
        rows, *rest = self.parameter.shape or (1,)
        shape = [2, rows // 2, *rest] if self.gated else list(self.parameter.shape)
        if self.split_dim is not None:
            shape[self.split_dim] *= self.shards
        return tuple(shape)

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a whole tensor, in the shape of the parameter."""
        if self.split_dim is not None:
            whole = whole.chunk(self.shards, dim=self.split_dim)[self.shard_index]
        return whole.reshape(self.parameter.shape)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collect the slices of the whole from the tensor-parallel group (every rank of it must call)."""
        local = self.local_view(tensor.detach()).contiguous()
        if self.shards == 1:
            return local.clone()
        parts = [torch.empty_like(local) for _ in range(self.shards)]
        torch.distributed.all_gather(parts, local, group=self.tensor_group)
        return torch.cat(parts, dim=self.split_dim or 0)


def global_name(local_name: str, *, first_layer: int, first_expert: int) -> str:
    """Translate a parameter name of this rank's model to the global one.

    Args:
        local_name: name inside the unwrapped model; layers counted from zero on this stage.
        first_layer: global index of the stage's first decoder layer.
        first_expert: global index of the rank's first expert.
    """
    match = _LAYER.match(local_name)
    if match and match["block"].endswith("decoder.layers."):
        local_name = f"{match['block']}{int(match['index']) + first_layer}.{local_name[match.end() :]}"
    for fused, plain in _FUSED_NORMS:
        local_name = local_name.replace(fused, plain)
    local_name = _GROUPED_EXPERT.sub(r".mlp.experts.local_experts.\2.\1.weight", local_name)
    return _EXPERT.sub(lambda found: f".mlp.experts.{int(found[1]) + first_expert}.{found[2]}", local_name)


def module_of(name: str) -> str:
    """Which of vision, connector and language a parameter name belongs to, of the model or of its wrapper."""
    name = name.removeprefix("module.")
    if name.startswith("vision_encoder."):
        return "vision"
    return "connector" if name.startswith("connector.") else "language"


def split_dimension(name: str, *, encoder_is_whole: bool) -> int | None:
    """Dimension along which tensor parallelism splits a parameter; None = every rank holds it whole.

    A table, because the marks that layers leave on their parameters differ between megatron-core's, Transformer
    Engine's and the experts'.

    Args:
        name: global name.
        encoder_is_whole: the encoder is data-parallel inside the tensor-parallel group.
    """
    if name.startswith("connector.") or (name.startswith("vision_encoder.") and encoder_is_whole):
        return None
    module, leaf = name.split(".")[-2:]
    dim = _SPLIT.get(module)
    return None if leaf == "bias" and dim == 1 else dim


def spread_by_size(items: Iterable[GlobalParameter]) -> dict[nn.Parameter, int]:
    """Give each parameter to one of the ranks that hold the same slice, so that these hold about the same.

    Tensor-parallel neighbours decide alike, and frozen parameters change nothing for trained ones.

    Args:
        items: all parameters of this rank.

    Returns:
        The rank in ``data_group``.
    """
    owners: dict[nn.Parameter, int] = {}
    loads: dict[ProcessGroup, list[int]] = {}
    for item in sorted(items, key=lambda i: (not i.parameter.requires_grad, -i.parameter.numel(), i.name)):
        held = loads.setdefault(item.data_group, [0] * item.data_group.size())
        owners[item.parameter] = owner = held.index(min(held))
        held[owner] += item.parameter.numel()
    return owners


def global_parameters(chunks: Iterable[nn.Module]) -> Iterator[GlobalParameter]:
    """Describe every parameter of this rank's model chunks (MM15Model, unwrapped), in a fixed order."""
    for chunk in chunks:
        tied_on_last = chunk.share_embeddings_and_output_weights and not chunk.pre_process
        for local_name, parameter in chunk.named_parameters():
            name = global_name(local_name, first_layer=chunk.first_layer, first_expert=chunk.first_expert)
            groups, expert = chunk.stage.groups, ".mlp.experts." in name
            tied_copy = tied_on_last and name == "language_model.output_layer.weight"
            dim = split_dimension(name, encoder_is_whole=chunk.stage.encoder_shares_tiles)
            gated = name.startswith("language_model.") and name.endswith(_GATED) and chunk.config.gated_linear_unit
            yield GlobalParameter(
                name="language_model.embedding.word_embeddings.weight" if tied_copy else name,
                parameter=parameter,
                split_dim=dim + 1 if gated and dim is not None else dim,
                gated=gated,
                tensor_group=groups.expt_tp if expert else groups.tp,
                data_group=groups.expt_dp if expert else groups.dp_cp,
                tied_copy=tied_copy,
            )
