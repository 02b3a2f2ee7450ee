"""Greedy generation: the same answers in every layout and in every company, and the end of text ends them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mm15_megatron.batch import RankView
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.collate import ImageSettings, TileLoader, collate
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.samples import ImageRef, Sample
from mm15_megatron.evaluation.generate import Generator, Prompt
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts

from ..helpers.layouts import LAYOUTS, change, debug_config

IMAGE = 255
NEVER = 256  # past the vocabulary: nothing ends an answer
NEW = 6


def _config(**sections: dict[str, object]) -> RunConfig:
    # Large initial weights, so that a random model's answers depend on the prompt and the picture.
    language = {"init_method_std": 0.3, "vocab_size": 256}
    return change(debug_config(), language=language, data={"decoder": "pil"}, **sections)


def _picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def _prompts() -> list[Prompt]:
    rng = np.random.default_rng(5)
    plans = [(4, 1), (9, 0), (3, 2), (12, 1), (1, 0), (7, 1), (5, 3)]
    prompts = []
    for number, (text, images) in enumerate(plans):
        tokens = [IMAGE] * images + rng.integers(0, 250, text).tolist()
        prompts.append(Prompt(tuple(tokens), tuple(_picture(10 * number + k) for k in range(images))))
    return prompts


def _generate(cfg: RunConfig, *, prompts: list[Prompt], eos_id: int = NEVER, together: int = 64) -> list[list[int]]:
    parts = build_parts(cfg)
    generator = Generator(
        parts.chunks[0].module,
        cfg,
        topology=parts.topology,
        eos_id=eos_id,
        image_id=IMAGE,
        prompts_together=together,
    )
    answers = generator.generate(prompts, max_new_tokens=NEW)
    close_topology()
    return answers


def _by_hand(cfg: RunConfig, *, prompts: list[Prompt]) -> list[list[int]]:
    """Each prompt alone through the training path's collation, one new token at a time."""
    model = build_parts(cfg).chunks[0].module
    rules = PackingRules.from_config(cfg, image_sentinel_id=IMAGE)
    tiles = TileLoader(ImageSettings.from_config(cfg))
    answers = []
    for prompt in prompts:
        ids = list(prompt.tokens)
        refs = tuple(ImageRef(0, item, 56, 56) for item in range(len(prompt.images)))
        for _ in range(NEW):
            sample = Sample.whole(np.array(ids), np.zeros(len(ids), np.bool_), refs)
            batch = collate(
                [(0, [sample])],
                rules,
                view=RankView(),
                tiles=tiles,
                fetch=lambda ref, images=prompt.images: np.frombuffer(images[ref.item], np.uint8),
            )
            end = int(batch.segment_bounds_G[1]) - 1
            with torch.no_grad():
                ids.append(int(model(batch)[0, end, :IMAGE].argmax()))
        answers.append(ids[len(prompt.tokens) :])
    close_topology()
    return answers


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    (answers,) = run_on_ranks(_generate, 1, cfg=_config(), prompts=_prompts())
    return answers


def test_answers_are_those_of_the_plain_loop(reference: list[list[int]]) -> None:
    (by_hand,) = run_on_ranks(_by_hand, 1, cfg=_config(), prompts=_prompts())
    assert reference == by_hand
    assert len({tuple(answer) for answer in reference}) == len(reference), "the prompts do not tell the answers apart"


def test_pictures_decide_answers(reference: list[list[int]]) -> None:
    others = [replace(p, images=tuple(_picture(100 + k) for k in range(len(p.images)))) for p in _prompts()]
    (answers,) = run_on_ranks(_generate, 1, cfg=_config(), prompts=others)
    for prompt, before, after in zip(others, reference, answers, strict=True):
        assert (before != after) == bool(prompt.images)


@pytest.mark.parametrize("together", [1, 3])
def test_answers_do_not_depend_on_the_company(reference: list[list[int]], together: int) -> None:
    (answers,) = run_on_ranks(_generate, 1, cfg=_config(), prompts=_prompts(), together=together)
    assert answers == reference


@pytest.mark.parametrize("name", ["tp2", "tp2sp", "dp2", "tp2-encoder-tp"])
def test_every_layout_gives_the_answers_of_one_rank(reference: list[list[int]], name: str) -> None:
    layout = LAYOUTS[name]
    for answers in run_on_ranks(_generate, layout.world_size, cfg=layout.apply(_config()), prompts=_prompts()):
        assert answers == reference


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", ["ep2", "tp2sp-etp1", "tp2sp-ep2-etp1"])
def test_experts_answer_in_every_layout(name: str, count: int) -> None:
    """Ranks with fewer prompts, or whose answers end earlier, stay for the experts that others need."""
    cfg = change(_config(), moe=vars(debug_config("debug_moe").moe))
    prompts = _prompts()[:count]
    (alone,) = run_on_ranks(_generate, 1, cfg=cfg, prompts=prompts)
    (ended,) = run_on_ranks(_generate, 1, cfg=cfg, prompts=prompts, eos_id=alone[0][1])
    layout = parse_layout(name)
    found = run_on_ranks(_generate, layout.world_size, cfg=layout.apply(cfg), prompts=prompts, together=3)
    assert all(answers == alone for answers in found)
    early = run_on_ranks(_generate, layout.world_size, cfg=layout.apply(cfg), prompts=prompts, eos_id=alone[0][1])
    assert all(answers == ended for answers in early)


def test_the_end_of_text_ends_an_answer_and_is_left_out(reference: list[list[int]]) -> None:
    eos = reference[0][2]
    (answers,) = run_on_ranks(_generate, 1, cfg=_config(), prompts=_prompts(), eos_id=eos)
    assert len(answers[0]) < NEW
    for answer, full in zip(answers, reference, strict=True):
        assert answer == (full[: full.index(eos)] if eos in full else full)


def test_padding_ids_and_the_sentinel_are_never_generated() -> None:
    # 250 of 256 padded ids are real, and the sentinel is one of them
    cfg = change(_config(), language={"vocab_size": 250})
    prompts = [Prompt(tuple(range(n, n + 5))) for n in range(40)]
    (answers,) = run_on_ranks(_generate_small, 1, cfg=cfg, prompts=prompts)
    assert {token for answer in answers for token in answer} <= set(range(249))


def _generate_small(cfg: RunConfig, *, prompts: list[Prompt]) -> list[list[int]]:
    parts = build_parts(cfg)
    model = parts.chunks[0].module
    with torch.no_grad():  # make what must not be chosen the most probable
        model.language_model.output_layer.weight[249:] *= 50.0
    generator = Generator(model, cfg, topology=parts.topology, eos_id=0, image_id=249)
    answers = generator.generate(prompts, max_new_tokens=2)
    close_topology()
    return answers


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(tuple(range(123))), "has room for 1 to 122"),
        (Prompt(()), "prompts of 0 to"),
        (Prompt((1, 2, IMAGE)), "1 image placeholders and 0 images"),
        (Prompt((IMAGE, 1), (b"no picture",)), "not an allowed image format"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(prompt: Prompt, message: str) -> None:
    with pytest.raises(RankFailure, match=f"DataError: .*{message}"):
        run_on_ranks(_generate, 1, cfg=_config(), prompts=[*_prompts()[:1], prompt])


def test_pipeline_stages_are_refused() -> None:
    layout = LAYOUTS["pp2"]
    with pytest.raises(RankFailure, match="ConfigError: parallel.pipeline_model_parallel_size = 2"):
        run_on_ranks(_generate, 2, cfg=layout.apply(_config()), prompts=_prompts())
