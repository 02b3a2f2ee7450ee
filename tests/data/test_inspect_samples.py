"""What the page of samples shows, before it is a page: texts of tokens, roles, tiles, boxes, choices of documents."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mm15_megatron.batch import RankView
from mm15_megatron.config.parse import parse
from mm15_megatron.config.schema import VisionConfig
from mm15_megatron.data.boxes import Scale, find_written
from mm15_megatron.data.collate import ImageSettings, TileLoader, collate
from mm15_megatron.data.image.geometry import TilePlan, View
from mm15_megatron.data.image.views import TileMaker
from mm15_megatron.data.indexed.format import file_digest, with_suffix
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.inspect_figures import data_url
from mm15_megatron.data.inspect_html import PageOptions, parse_documents
from mm15_megatron.data.inspect_markup import Markup, counted, element, markup
from mm15_megatron.data.inspect_samples import DocumentViewer, ShownDocument, ShownToken, ShowRules, spread
from mm15_megatron.data.inspect_tokens import token_texts, visible
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.samples import SampleRef, read_sample
from mm15_megatron.data.sft import Conversation, Turn, build_conversations
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import DataError
from mm15_megatron.presets import REGISTRY

from ..helpers.tools import load_tool
from . import inspect_sources as sources
from .images import photo


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return sources.byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def viewer(prefix: Path, tokenizer: Tokenizer, *words: str, max_pieces: int = 8) -> DocumentViewer:
    cfg = parse(["--preset=debug_dense", "data.decoder=pil", *words], presets=REGISTRY)
    rules = ShowRules.from_config(cfg, tokenizer, scale=Scale(), max_pieces=max_pieces)
    return DocumentViewer(IndexedSource(prefix), tokenizer, rules)


# --- Texts of tokens


@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=40))
def test_texts_of_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Whatever the characters: joined, they are what was encoded, and a part of a character has none."""
    ids = tokenizer.encode(text)
    found = token_texts(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(part or "" for part in found) == text


def test_characters_of_several_tokens_stand_at_their_last(tokenizer: Tokenizer) -> None:
    assert token_texts(tokenizer.encode("é北"), tokenizer) == [None, "é", None, None, "北"]
    cut = tokenizer.encode("a北")[:-1]
    assert token_texts(cut, tokenizer) == ["a", "\ufffd", "\ufffd"]
    assert token_texts([tokenizer.eos_id, tokenizer.encode("x")[0], 10**6], tokenizer) == ["", "x", ""]


def test_spaces_of_sentencepiece_are_kept(tmp_path: Path) -> None:
    """It writes the space of a word in front of it, and drops that of a first word; also behind an end of text."""
    lines = [f"the number {i} stands beside {i * 7 % 13}, said the reader" for i in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "t"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    tokenizer = Tokenizer(tmp_path / "t.model")
    ids = tokenizer.encode("the number said")
    assert "".join(part or "" for part in token_texts(ids, tokenizer)) == "the number said"
    both = token_texts([*ids, tokenizer.eos_id, *ids], tokenizer)
    assert "".join(part or "" for part in both[len(ids) :]) == " the number said"


def test_what_has_no_shape_is_written_out() -> None:
    assert visible("a\n\t\r") == "a↵\n⇥\t␍"
    assert visible("\x00\u202e\ud800\ufeff") == "‹U+0000›‹U+202E›‹U+D800›‹U+FEFF›"
    assert visible("é👩\u200d🚀 <b>") == "é👩\u200d🚀 <b>"


def test_boxes_are_found_where_they_stand() -> None:
    (box, point) = find_written("at <1,2,30,4> and<5,6>, not <1,2,3> nor <a,b>")
    assert (box.start, box.stop, box.numbers) == (3, 13, (1, 2, 30, 4))
    assert (point.start, point.stop, point.numbers) == (17, 22, (5, 6))


# --- Markup


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert element("b", "<i>", Markup("<i>"), title='"<&') == '<b title="&quot;&lt;&amp;">&lt;i&gt;<i></b>'
    assert element("rect", x=1.0, y=0.125, height=3, class_="a", data_n=None) == (
        '<rect x="1" y="0.12" height="3" class="a"></rect>'
    )
    assert element("img", alt="") == '<img alt="">'
    assert markup("<", Markup("<")) == "&lt;<"
    assert (counted(1, "slot"), counted(1024, "slot")) == ("1 slot", "1,024 slots")


# --- Which documents


def test_documents_are_spread_over_the_dataset() -> None:
    chosen = spread(10_000, 20, seed=3)
    assert chosen == spread(10_000, 20, seed=3) != spread(10_000, 20, seed=4)
    assert [number // 500 for number in chosen] == list(range(20))
    assert spread(3, 20, seed=0) == [0, 1, 2]
    assert spread(0, 20, seed=0) == []


def test_documents_by_name_or_number() -> None:
    assert parse_documents("24") == 24
    assert parse_documents("7,") == (7,)
    assert parse_documents("3,10-12,3") == (3, 10, 11, 12)
    for wrong in ("three", "3,x", "-3", ""):
        with pytest.raises(DataError, match="neither a number nor a list"):
            parse_documents(wrong)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"count": 0}, "nothing to show"), ({"documents": ()}, "nothing to show"), ({"pictures": "gif"}, "'gif'")],
)
def test_wrong_options_are_refused(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        PageOptions(**wrong)  # type: ignore[arg-type]


# --- What is shown


def test_colours_of_tiles_come_back_exactly() -> None:
    maker = TileMaker(VisionConfig(image_size=28))
    pixels_HWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    plan = TilePlan((1, 1), overview=False, views=(View(1, 1, 28, 28),))
    assert torch.equal(maker.pixels(maker.tiles(pixels_HWC, plan))[0], pixels_HWC)


def texts_of(shown: ShownDocument, role: str) -> list[str]:
    return [
        "".join(p.text for p in piece.parts if isinstance(p, ShownToken) and p.role == role) for piece in shown.pieces
    ]


def test_only_answers_are_targets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shown = viewer(sources.talk(tmp_path / "talk", tokenizer), tokenizer).document(0)
    assert not shown.broken
    assert texts_of(shown, "target") == [" This.</s> So.</s>"]
    assert texts_of(shown, "context") == ["USER:  what? ASSISTANT:USER: Why? ASSISTANT:"]


def test_pieces_share_a_token_and_the_first_ones_are_shown(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = sources.text(tmp_path / "text", tokenizer, documents=1)
    shown = viewer(prefix, tokenizer, "data.seq_length=32", max_pieces=3).document(0)
    assert (len(shown.pieces), shown.all_pieces > 3) == (3, True)
    roles = [[part.role for part in piece.parts if isinstance(part, ShownToken)] for piece in shown.pieces]
    assert [row[0] for row in roles] == ["context", "shared", "shared"]
    assert all(set(row[1:]) == {"target"} for row in roles)
    ends = [
        (piece.parts[0].text, before.parts[-1].text)
        for before, piece in zip(shown.pieces[:-1], shown.pieces[1:], strict=True)
    ]
    assert all(first == last for first, last in ends)


def test_a_box_is_placed_on_the_image_before_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = sources.grounding(tmp_path / "boxes", tokenizer, folder=tmp_path)
    (piece,) = viewer(prefix, tokenizer).document(0).pieces
    box, whole = piece.regions
    assert np.abs(np.subtract(box.pixels, sources.RED_BOX)).max() <= 0.5 * 200 / 672
    assert np.abs(np.subtract(whole.pixels, (0, 0, *sources.RED_SIZE))).max() <= 200 / 672  # the scale ends at 671
    assert (box.certain, box.image) == (True, 0)
    tokens = [part for part in piece.parts if isinstance(part, ShownToken) and part.region == 1]
    assert "".join(token.text for token in tokens).strip(" .,") == box.text


def test_of_several_images_it_is_the_last_one_before_the_box(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The text does not say which; a box that no image stands before is drawn nowhere."""
    images = (photo(40, 80, seed=1), photo(80, 40, seed=2))
    asked = Turn("user", "<1,2,3,4><image><84,42><image>")
    talk = Conversation((asked, Turn("assistant", "a<0,0,672,336>b<0,0,336,672>")), images)
    build_conversations(tmp_path / "talk", [talk], tokenizer)
    (piece,) = viewer(tmp_path / "talk", tokenizer).document(0).pieces
    found = [(region.number, region.image, region.certain, region.pixels) for region in piece.regions]
    assert found == [
        (1, None, False, ()),
        (2, 0, False, (10, 5)),
        (3, 1, False, (0, 0, 80, 40)),
        (4, 1, False, (0, 0, 40, 80)),
    ]


@pytest.mark.parametrize("mode", ["none", "static", "dynamic"])
def test_pictures_are_the_tiles_of_the_loader(tmp_path: Path, tokenizer: Tokenizer, mode: str) -> None:
    """The pictures of the page, normalised again, are bitwise what a micro-batch of the trainer holds."""
    prefix = sources.talk(tmp_path / "talk", tokenizer)
    words = (f"tiling.mode={mode}", "data.seq_length=256", "data.max_tiles=40")
    (piece,) = viewer(prefix, tokenizer, *words).document(2).pieces
    cfg = parse(["--preset=debug_dense", "data.decoder=pil", *words], presets=REGISTRY)
    source = IndexedSource(prefix)
    rules = PackingRules.from_config(cfg, image_sentinel_id=tokenizer.image_id)
    sample = read_sample(source, SampleRef(0, 2, 0, int(source.token_lengths[2])))
    loader = TileLoader(ImageSettings.from_config(cfg))
    fetch = lambda ref: source.image_bytes(ref.item)  # noqa: E731
    batch = collate([(0, [sample])], rules, view=RankView(), tiles=loader, fetch=fetch)
    urls = [data_url(tile, form="png") for image in piece.images for view in image.views for tile in view.pixels]
    tiles = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls]
    pixels_N3TT = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float()
    vision = cfg.vision
    mean_C11, std_C11 = (torch.tensor(v).view(3, 1, 1) * 255.0 for v in (vision.image_mean, vision.image_std))
    assert batch.tiles_N3HW is not None
    padding = batch.tiles_N3HW == 0.0  # no colour of a picture is exactly the mean
    again_N3TT = (pixels_N3TT - mean_C11) * (1.0 / std_C11)
    assert torch.equal(again_N3TT[~padding], batch.tiles_N3HW[~padding])
    assert bool(padding.any()) == (mode == "dynamic")
    assert torch.equal(pixels_N3TT[padding], mean_C11.round().expand_as(pixels_N3TT)[padding])


def test_losses_by_the_rules_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    look = viewer(sources.web(tmp_path / "web", tokenizer), tokenizer, "data.max_images=2", "data.seq_length=24")
    assert any("images are left out" in note for note in look.document(3).notes)
    talk = sources.talk(tmp_path / "talk", tokenizer)
    assert viewer(talk, tokenizer, "data.max_images=3").document(4).notes == (
        "left out: more images than data.max_images",
    )
    (note,) = viewer(talk, tokenizer, "data.seq_length=20").document(0).notes
    assert note.startswith("truncated: its last")


def test_a_broken_document_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    look = viewer(sources.broken(tmp_path / "bad", tokenizer), tokenizer)
    good, cut, script, other, empty, foreign, untargeted, many = map(look.document, range(8))
    assert [s.broken for s in (good, many)] == [False, False]
    assert many.notes == ("left out: more images than data.max_images",)
    assert (cut.problems, bool(cut.pieces[0].images[0].problem)) == ((), True)
    assert "not an allowed image format" in script.problems[0]
    assert "another size" in other.problems[0]
    assert empty.problems[0] == "no token"
    assert "ids that the tokenizer does not have: [70000]" in foreign.problems[0]
    assert untargeted.problems == ("no target",)
    assert all(len(shown.pieces) == 1 for shown in (cut, script, other, foreign))


def test_a_damaged_index_breaks_its_document_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = sources.captions(tmp_path / "pairs", tokenizer)
    path = with_suffix(prefix, "_image_positions.npy")
    positions = np.load(path)
    positions[1] = 10**6
    np.save(path, positions)
    manifest = json.loads(with_suffix(prefix, ".json").read_text())
    manifest["files"]["_image_positions.npy"]["digest"] = file_digest(path)
    with_suffix(prefix, ".json").write_text(json.dumps(manifest))
    look = viewer(prefix, tokenizer, "data.max_images=1")
    assert "elsewhere than was stored" in look.document(1).problems[0]
    assert [look.document(n).broken for n in (0, 2)] == [False, False]


# --- The tool


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--html", "PAGE"], "--html without a tokenizer"),
        (["--html", "PAGE", "--tokenizer", "T", "--documents", "9-12"], "has no documents [10, 11, 12]"),
        (["--html", "PAGE", "--tokenizer", "T", "--documents", "all"], "neither a number nor a list"),
        (["--html", "PAGE", "--tokenizer", "T", "--documents", "0"], "nothing to show"),
        (["--html", "PAGE", "--tokenizer", "T", "--scale", "1"], "coordinates of 1 numbers"),
        (["--html", "PAGE", "--tokenizer", "T", "data.seq_len=3"], "seq_len"),
        (["--html", "PAGE", "--tokenizer", "T", "--preset", "debug"], "unknown preset"),
        (["--preset", "debug_dense"], "a run is named without --html"),
    ],
)
def test_wrong_command_lines_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    prefix = sources.text(tmp_path / "text", tokenizer, documents=10)
    page = tmp_path / "page.html"
    given = [{"PAGE": str(page), "T": str(tokenizer.path)}.get(word, word) for word in words]
    assert load_tool("inspect_dataset").main([str(prefix), *given]) == 2
    assert message in capsys.readouterr().err
    assert not page.exists()
