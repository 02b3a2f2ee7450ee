"""Greedy answers from the model in its parallel layout.

Many prompts share one packed row, one segment each, and the whole row runs again for every new token: there is no
cache yet.

n: prompts in the row; N: tiles; T: tokens of the row; V: vocabulary, whole or this rank's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import torch

from mm15_megatron.batch import MMBatch, TileShare
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.collate import ImageSettings, TileLoader
from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.row_layout import Layout, lay_out, tokens_in_row
from mm15_megatron.data.samples import ImageRef, Sample
from mm15_megatron.data.tile_text import TileTexts
from mm15_megatron.errors import ConfigError, DataError
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.topology import Topology

_NO_TEXTS: Final = TileTexts()


@dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
        tokens: ids, one image sentinel where each image stands (``data.sft.encode_prompt``).
        images: encoded bytes, one for each sentinel, in order.
    """

    tokens: tuple[int, ...]
    images: tuple[bytes, ...] = ()


@dataclass
class _Sequence:
    """A prompt being answered: its images, its tiles [N, 3, H, W], and the ids generated so far."""

    prompt: Prompt
    images: tuple[ImageRef, ...]
    tiles_N3HW: torch.Tensor
    answer: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def sample(self) -> Sample:
        tokens = np.array([*self.prompt.tokens, *self.answer], dtype=np.int64)
        return Sample.whole(tokens, np.zeros(len(tokens), np.bool_), self.images, source="prompt")


class Generator:
    """Answers prompts with the most probable token at each position.

    Args:
        model: the whole model (one pipeline stage); its weights are only read.
        cfg: the run it was built for.
        topology: the layout; every rank calls every method with the same prompts.
        eos_id: end of text, which ends an answer.
        image_id: the image sentinel of the prompts; it is never generated.
        tile_texts: position indicators, as in training.
        prompts_together: prompts of one packed row, a bound on memory.

    Raises:
        ConfigError: the model is cut into stages or its rows over ranks, or ``prompts_together`` prompts do not
            fit a row.
    """

    def __init__(
        self,
        model: MM15Model,
        cfg: RunConfig,
        *,
        topology: Topology,
        eos_id: int,
        image_id: int,
        tile_texts: TileTexts = _NO_TEXTS,
        prompts_together: int = 64,
    ) -> None:
        if topology.pipeline_size > 1:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size = {topology.pipeline_size}: answers are generated on one stage",
                fix="set parallel.pipeline_model_parallel_size=1; a checkpoint loads into any layout",
            )
        if topology.groups.cp.size() > 1:
            raise ConfigError(
                f"parallel.context_parallel_size = {topology.groups.cp.size()}: answers are generated from whole rows",
                fix="set parallel.context_parallel_size=1; a checkpoint loads into any layout",
            )
        self._model = model
        self._cfg = cfg
        self._topology = topology
        self._eos_id = eos_id
        self._image_id = image_id
        self._rules = PackingRules.from_config(cfg, image_sentinel_id=image_id, tile_texts=tile_texts)
        if not 1 <= prompts_together <= self._rules.max_samples:
            raise ConfigError(
                f"prompts_together = {prompts_together}", fix=f"use 1 to {self._rules.max_samples} prompts a row"
            )
        self._together = prompts_together
        # An answer about a substituted image would mean nothing.
        self._tiles = TileLoader(replace(ImageSettings.from_config(cfg), on_bad_image="raise"))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[list[int]]:
        """Return the generated ids of each prompt, without the end of text that ended it.

        Data-parallel ranks answer a share of the prompts each and exchange the answers. They run the model equally
        often, one that is done on a row of no meaning: experts may be spread over them, and a sparse layer needs all.

        Raises:
            DataError: a prompt has no token, does not leave room for the answer in ``data.seq_length``, has other than
                one image for each sentinel, or an image that does not decode.
        """
        size = self._topology.data_size
        mine = list(prompts[self._topology.data_rank :: size])
        was_training = self._model.training
        self._model.eval()
        answers: list[list[int]] = []
        rounds = -(-len(prompts) // (size * self._together))
        for start in range(0, rounds * self._together, self._together):
            answers += self._answer(mine[start : start + self._together], limit=max_new_tokens)
        self._model.train(was_training)
        shares: list[list[list[int]]] = [answers] * size
        torch.distributed.all_gather_object(shares, answers, group=self._topology.groups.dp)
        return [shares[index % size][index // size] for index in range(len(prompts))]

    def _answer(self, prompts: Sequence[Prompt], *, limit: int) -> list[list[int]]:
        sequences = self._open(prompts, limit=limit) if prompts else []
        for _ in range(limit):
            live = [sequence for sequence in sequences if not sequence.finished]
            if not self._any_rank(bool(live)):
                break
            tokens = self._next_tokens(live or [self._no_prompt()])
            for sequence, token in zip(live, tokens[: len(live)], strict=True):
                sequence.finished = token == self._eos_id
                if not sequence.finished:
                    sequence.answer.append(token)
        return [sequence.answer for sequence in sequences]

    def _any_rank(self, mine: bool) -> bool:
        """Whether any data-parallel rank still has something to answer."""
        flag = torch.tensor(int(mine), device=self._topology.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._topology.groups.dp)
        return bool(flag.item())

    def _no_prompt(self) -> _Sequence:
        none = torch.zeros(0, 3, self._rules.tile_size, self._rules.tile_size)
        return _Sequence(Prompt((0,)), (), none)

    def _open(self, prompts: Sequence[Prompt], *, limit: int) -> list[_Sequence]:
        """Decode the images of all prompts once."""
        max_pixels = self._cfg.data.max_image_pixels
        encoded = [data for prompt in prompts for data in prompt.images]
        checked = [check_image(data, max_pixels=max_pixels, decode=False) for data in encoded]
        refs = iter([ImageRef(0, item, image.height, image.width) for item, image in enumerate(checked)])
        none = torch.zeros(0, 3, self._rules.tile_size, self._rules.tile_size)
        sequences = [_Sequence(p, tuple(next(refs) for _ in p.images), none) for p in prompts]
        layout = self._lay_out(sequences)
        self._check_room(layout, len(prompts), limit=limit)
        total = len(layout.slots_NP)
        tiles_N3HW, _ = self._tiles.load(
            layout.images,
            lambda ref: np.frombuffer(encoded[ref.item], np.uint8),
            share=TileShare(start=0, stop=total, padded=total),
        )
        at = 0
        for sequence in sequences:
            plans = self._rules.plans(sequence.images, images_in_sample=len(sequence.images))
            owned = sum(plan.num_tiles for plan in plans)
            sequence.tiles_N3HW = tiles_N3HW[at : at + owned]
            at += owned
        return sequences

    def _check_room(self, layout: Layout, prompts: int, *, limit: int) -> None:
        lengths = layout.segment_bounds_G[: prompts + 1].diff()
        shortest, longest = int(lengths.min()), int(lengths.max())
        room = self._cfg.data.seq_length - limit
        if shortest < 1 or longest > room:
            raise DataError(
                f"prompts of {shortest} to {longest} tokens, image slots included: data.seq_length = "
                f"{self._cfg.data.seq_length} with {limit} new tokens has room for 1 to {room}",
                fix="shorten the prompt or generate fewer tokens",
            )

    def _lay_out(self, sequences: Sequence[_Sequence]) -> Layout:
        """Lay the sequences end to end in one row, just long enough and a multiple of the tensor-parallel size."""
        samples = [sequence.sample for sequence in sequences]
        used = sum(tokens_in_row(sample, self._rules) for sample in samples)
        size = self._topology.tensor_size
        length = max(len(samples), -(-used // size) * size)
        return lay_out([(0, samples)], replace(self._rules, seq_length=length))

    def _next_tokens(self, live: Sequence[_Sequence]) -> list[int]:
        """Run the model once and return the most probable next token of each sequence."""
        layout = self._lay_out(live)
        batch = MMBatch(
            segment_bounds_G=layout.segment_bounds_G,
            max_segment=len(layout.tokens_T),
            position_ids_T=layout.position_ids_T,
            padding_mask_T=layout.padding_mask_T,
            tokens_T=layout.tokens_T,
            tiles_N3HW=torch.cat([sequence.tiles_N3HW for sequence in live]),
            slots_NP=layout.slots_NP,
            rows=layout.records,
        )
        logits_TV = self._model(local_batch(batch, topology=self._topology, image_size=self._rules.tile_size))[0]
        last_n = (layout.segment_bounds_G[1 : len(live) + 1] - 1).to(logits_TV.device)
        logits_nV = self._whole_vocabulary(logits_TV[last_n])
        logits_nV[:, self._cfg.language.vocab_size :] = float("-inf")
        logits_nV[:, self._image_id] = float("-inf")
        return [int(token) for token in logits_nV.argmax(dim=-1).tolist()]

    def _whole_vocabulary(self, logits_nV: torch.Tensor) -> torch.Tensor:
        """Gather the vocabulary's shares, fp32 [n, V], the same on every rank of the tensor-parallel group."""
        shares = [torch.empty_like(logits_nV) for _ in range(self._topology.tensor_size)]
        torch.distributed.all_gather(shares, logits_nV.contiguous(), group=self._topology.groups.tp)
        return torch.cat(shares, dim=-1).float()
