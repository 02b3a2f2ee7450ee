"""What each module puts out, two numbers a token: where two layouts part, the first module that differs is at fault.

A fingerprint of a token's vector is its projection on a fixed direction and its norm. Ranks record what they hold;
shards of the sequence, shares of the tiles, pipeline stages and data-parallel ranks are put together afterwards, by the
global number of the layer and by sample, so that nothing is communicated while the model runs.

T: tokens of the packed row; N: tiles of this rank; P: slots or patches of a tile; n: recorded tokens; 2: projection and
norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn
from torch.utils.hooks import RemovableHandle

from mm15_megatron.batch import MMBatch
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.topology import Topology

SAMPLE, PADDING = "sample", "padding of row"
Key = tuple[str, int]
"""(``SAMPLE``, its number) or (``PADDING``, number of the row)."""

Span = tuple[Key, int, int]
"""Who owns the tokens from start to stop of a micro-batch."""

Fingerprints = dict[str, dict[Key, torch.Tensor]]
"""[n, 2], fp64, by module and owner."""

_BEFORE_LAYERS = ("vision_encoder", "connector", "embedding", "merged_input")
_LAYER = re.compile(r"decoder\.layers\.(\d+)(?:\.(self_attention|mlp))?$")
_INSIDE_LAYER = ("self_attention", "mlp", None)


def forward_position(module: str) -> tuple[int, int, int]:
    """Where a module of this file stands in the forward pass."""
    if module in _BEFORE_LAYERS:
        return (0, _BEFORE_LAYERS.index(module), 0)
    if match := _LAYER.fullmatch(module):
        return (1, int(match[1]), _INSIDE_LAYER.index(match[2]))
    return (2, 0, 0)


@dataclass(frozen=True)
class Piece:
    """What one rank saw of one module in one micro-batch.

    Attributes:
        module: global name.
        spans: owners of the tokens of the whole micro-batch.
        part: which of the consecutive parts of the micro-batch it is; ranks with the same part hold the same.
        values_n2: the fingerprints.
    """

    module: str
    spans: tuple[Span, ...]
    part: int
    values_n2: torch.Tensor


def merge(pieces: Iterable[Piece]) -> Fingerprints:
    """Put the pieces of all ranks together."""
    parts: dict[tuple[str, tuple[Span, ...]], dict[int, Piece]] = {}
    for piece in pieces:
        parts.setdefault((piece.module, piece.spans), {})[piece.part] = piece
    merged: Fingerprints = {}
    for (module, spans), by_part in parts.items():
        values = torch.cat([by_part[part].values_n2 for part in sorted(by_part)])
        owned = merged.setdefault(module, {})
        for key, start, stop in spans:
            earlier = [owned[key]] if key in owned else []
            owned[key] = torch.cat([*earlier, values[start:stop]])
    return merged


def fingerprint(x_nH: torch.Tensor) -> torch.Tensor:
    """Projection on a fixed direction and norm of every token, fp64 [n, 2] on the CPU."""
    x_nH = x_nH.detach().double()
    direction_H = torch.cos(torch.arange(x_nH.shape[-1], dtype=torch.float64, device=x_nH.device))
    return torch.stack((x_nH @ direction_H, x_nH.norm(dim=-1)), dim=-1).cpu()


def token_spans(batch: MMBatch) -> tuple[Span, ...]:
    """Owners of the tokens of a micro-batch."""
    bounds = batch.segment_bounds_G.tolist()
    length = batch.num_tokens // len(batch.rows)
    spans: list[Span] = []
    for index, row in enumerate(batch.rows):
        at = index * length
        owners: list[Key] = [(SAMPLE, sample.document) for sample in row.samples]
        for stop in (bound for bound in bounds if index * length < bound <= (index + 1) * length):
            if stop > at:
                spans.append((owners.pop(0) if owners else (PADDING, row.row), at, stop))
                at = stop
    return tuple(spans)


def tile_spans(batch: MMBatch, *, tokens_of_tile: int) -> tuple[Span, ...]:
    """Owners of the tokens of all tiles of a micro-batch, in tile order."""
    assert batch.slots_NP is not None, "stage 0 has slots"
    owners = token_spans(batch)
    spans = []
    for tile, first in enumerate(batch.slots_NP[:, 0].tolist()):
        key = next(key for key, start, stop in owners if start <= first < stop)
        spans.append((key, tile * tokens_of_tile, (tile + 1) * tokens_of_tile))
    return tuple(spans)


class Recorder:
    """Hooks on the modules of this rank's chunks; ``pieces`` fills up as they run.

    Args:
        chunks: wrapped model chunks.
        topology: this rank.
        sequence_parallel: hidden states are sharded along the sequence.

    Attributes:
        own_part: which part of a micro-batch's hidden states this rank holds: context-parallel ranks hold consecutive
            tokens, and under sequence parallelism their tensor-parallel ranks consecutive parts of these.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], *, topology: Topology, sequence_parallel: bool
    ) -> None:
        self.pieces: list[Piece] = []
        self.topology = topology
        self.own_part = topology.tile_rank if sequence_parallel else topology.groups.cp.rank()
        self._handles = [handle for chunk in chunks for handle in _ChunkHooks(self).attach(chunk.module)]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class _ChunkHooks:
    """The hooks of one chunk: they know which micro-batch its modules are working on."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.batch: MMBatch | None = None
        self.seen: set[str] = set()

    def attach(self, model: MM15Model) -> list[RemovableHandle]:
        handles = [model.register_forward_pre_hook(self._start)]
        decoder, own = model.language_model.decoder, self.recorder.own_part
        if model.pre_process:
            handles += [
                model.vision_encoder.register_forward_hook(partial(self._tiles, "vision_encoder")),
                model.connector.register_forward_hook(partial(self._tiles, "connector")),
                model.language_model.embedding.register_forward_hook(partial(self._tokens, "embedding", 0)),
                decoder.register_forward_pre_hook(self._merged_input, with_kwargs=True),
            ]
        watched: dict[str, nn.Module] = {}
        for index, layer in enumerate(decoder.layers, start=model.first_layer):
            name = f"decoder.layers.{index}"
            watched |= {f"{name}.self_attention": layer.self_attention, f"{name}.mlp": layer.mlp, name: layer}
        if decoder.final_layernorm is not None:
            watched["decoder.final_layernorm"] = decoder.final_layernorm
        hooks = [m.register_forward_hook(partial(self._tokens, name, own)) for name, m in watched.items()]
        return handles + hooks

    def _start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.batch = args[0]
        self.seen.clear()

    def _merged_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens("merged_input", self.recorder.own_part, module, args, kwargs["hidden_states"])

    def _tokens(self, name: str, part: int, module: nn.Module, args: Any, output: Any) -> None:
        """Record one part of [T, 1, H], possibly the first of a tuple."""
        x_T1H = output[0] if isinstance(output, tuple) else output
        if self._runs_first(name):
            self._add(name, token_spans(self._current()), x_T1H.flatten(0, 1), part=part)

    def _tiles(self, name: str, module: nn.Module, args: Any, x_NPD: torch.Tensor) -> None:
        """Record [N, P, D], without the dummies that stand behind the real tiles of the last shares."""
        batch, topology = self._current(), self.recorder.topology
        if batch.slots_NP is None or not self._runs_first(name):
            return
        part = topology.tile_rank if topology.encoder_shares_tiles else 0
        real = min(max(0, batch.slots_NP.shape[0] - part * x_NPD.shape[0]), x_NPD.shape[0])
        spans = tile_spans(batch, tokens_of_tile=x_NPD.shape[1])
        self._add(name, spans, x_NPD[:real].flatten(0, 1), part=part)

    def _current(self) -> MMBatch:
        assert self.batch is not None, "a module ran outside its chunk"
        return self.batch

    def _runs_first(self, name: str) -> bool:
        """Whether the module runs for the first time on this micro-batch, not again to recompute."""
        known = name in self.seen
        self.seen.add(name)
        return not known

    def _add(self, name: str, spans: tuple[Span, ...], x_nH: torch.Tensor, *, part: int) -> None:
        self.recorder.pieces.append(Piece(name, spans, part, fingerprint(x_nH)))
