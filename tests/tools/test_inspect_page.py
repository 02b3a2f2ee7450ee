"""The page of samples in a real Chromium: what a reader sees is what the layout says, and no document acts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm15_megatron.config.parse import parse
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.pieces import cut_documents
from mm15_megatron.data.row_layout import Layout, lay_out
from mm15_megatron.data.samples import SampleRef, read_sample
from mm15_megatron.data.tile_text import TileTexts
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.presets import REGISTRY

from ..data import inspect_sources as sources
from ..helpers import chromium
from ..helpers.chromium import Chromium, Seen
from ..helpers.tools import load_tool

pytestmark = pytest.mark.skipif(chromium.why_not() is not None, reason=str(chromium.why_not()))

SPLIT = ("tiling.mode=dynamic", "tiling.indicator=index", "data.seq_length=512", "data.max_tiles=40")
READ = """[...document.querySelectorAll('main article')].map(article => ({
  document: +article.dataset.document, state: article.querySelector('.state')?.textContent ?? '',
  notes: [...article.querySelectorAll('.problems li, .notes li, .problem')].map(e => e.textContent),
  pieces: [...article.querySelectorAll('.piece')].map(piece => ({
    tokens: [...piece.querySelectorAll('.target, .context, .shared, .indicator')]
      .map(e => [e.classList[0], e.title, e.textContent]),
    slots: [...piece.querySelectorAll('.slot')].map(e => [+e.dataset.slots, e.title]),
    images: [...piece.querySelectorAll('img')].map(e => [e.naturalWidth, e.naturalHeight, e.alt]),
  })),
}))"""
# The red of each view in pixels of its canvas, the box drawn there, and both as they stand on the screen
RED = """[...document.querySelectorAll('.canvas')].map(canvas => {
  const images = [...canvas.querySelectorAll('img')], side = images[0].naturalWidth;
  const svg = canvas.querySelector('svg'), box = svg.viewBox.baseVal, columns = box.width / side;
  const copy = document.createElement('canvas'); copy.width = box.width; copy.height = box.height;
  const draw = copy.getContext('2d');
  images.forEach((image, n) => draw.drawImage(image, n % columns * side, Math.floor(n / columns) * side));
  const data = draw.getImageData(0, 0, box.width, box.height).data, x = [], y = [];
  for (let n = 0; n < data.length; n += 4)
    if (data[n] > 178 && data[n + 1] < 65) { x.push(n / 4 % box.width); y.push(Math.floor(n / 4 / box.width)); }
  const seen = svg.getBoundingClientRect(), first = images[0].getBoundingClientRect();
  const last = images.at(-1).getBoundingClientRect();
  return {red: [Math.min(...x), Math.min(...y), Math.max(...x) + 1, Math.max(...y) + 1],
    over: [seen.left, seen.top, seen.right, seen.bottom], under: [first.left, first.top, last.right, last.bottom],
    colours: [...svg.querySelectorAll('.line')].map(e => getComputedStyle(e).stroke),
    drawn: [...svg.querySelectorAll('.line')].map(e => e.getBBox())
      .map(b => [b.x, b.y, b.x + b.width, b.y + b.height])};
})"""
READABLE = ".legend span, h1, .soft, nav a, .state, .problems li, .notes li, .meta, figcaption, .slot, .problem"
CONTRAST = (
    f"""[...document.querySelectorAll('{READABLE}')]"""
    + """.map(e => {
  const light = text => {
    const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * c[0] + .7152 * c[1] + .0722 * c[2];
  };
  let under = e; while (/, 0\\)$/.test(getComputedStyle(under).backgroundColor)) under = under.parentElement;
  const pair = [getComputedStyle(e).color, getComputedStyle(under).backgroundColor].map(light).sort((a, b) => b - a);
  return [(pair[0] + .05) / (pair[1] + .05), e.className + ' ' + e.textContent.slice(0, 30)];
})"""
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return sources.byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium.browser(tmp_path_factory.mktemp("chromium")) as opened:
        opened.window(1200, 900)
        yield opened


@dataclass(frozen=True)
class Shown:
    """A page as Chromium shows it, and the layouts it must agree with, by document."""

    path: Path
    articles: list[dict[str, Any]]
    seen: Seen
    layouts: dict[int, list[Layout]]


def rules_of(tokenizer: Tokenizer, words: tuple[str, ...]) -> PackingRules:
    cfg = parse(["--preset=debug_dense", *words], presets=REGISTRY)
    texts = TileTexts.build(cfg.tiling, tokenizer.encode)
    return PackingRules.from_config(cfg, image_sentinel_id=tokenizer.image_id, tile_texts=texts)


def layouts_of(prefix: Path, document: int, rules: PackingRules) -> list[Layout]:
    source = IndexedSource(prefix)
    pieces = cut_documents(source, np.array([document]), rules).pieces
    spans = zip(pieces.first.tolist(), pieces.stop.tolist(), strict=True)
    return [lay_out([(0, [read_sample(source, SampleRef(0, document, *span))])], rules) for span in spans]


def show(browser: Chromium, prefix: Path, tokenizer: Tokenizer, *words: str, options: tuple[str, ...] = ()) -> Shown:
    """Write the page by the tool, open it, and read it."""
    page = prefix.with_suffix(".html")
    given = [str(prefix), "--html", str(page), "--tokenizer", str(tokenizer.path), "--preset", "debug_dense"]
    assert load_tool("inspect_dataset").main([*given, "--pieces", "99", *options, *words]) == 0
    seen = browser.open(page)
    articles = browser.evaluate(READ)
    rules = rules_of(tokenizer, words)
    layouts = {a["document"]: layouts_of(prefix, a["document"], rules) for a in articles}
    return Shown(page, articles, seen, layouts)


def check_quiet(shown: Shown) -> None:
    """The page asked for nothing but itself and what is in it, and the console is empty."""
    assert shown.seen.messages == []
    assert shown.seen.requests[0] == shown.path.resolve().as_uri()
    assert [url[:60] for url in shown.seen.requests[1:] if not url.startswith("data:")] == []


def check_agrees(shown: Shown, *, tile_size: int = 56) -> None:
    """Every position of every piece is shown once, with its id, and in the colour of the loss mask."""
    for article in shown.articles:
        layouts = shown.layouts[article["document"]]
        assert len(article["pieces"]) == len(layouts)
        for piece, layout in zip(article["pieces"], layouts, strict=True):
            ids, weights = layout.tokens_T.tolist(), layout.loss_mask_T.tolist()
            used = int((~layout.padding_mask_T).sum())
            places = []
            for role, title, _ in piece["tokens"]:
                token, position = map(int, title.split(" @ "))
                assert ids[position] == token
                assert (role == "target") == (position > 0 and weights[position - 1] > 0), (title, role)
                places.append(position)
            slots = [(int(t.split("positions ")[1].split(" to ")[0]), n) for n, t in piece["slots"]]
            assert [list(range(first, first + n)) for first, n in slots] == layout.slots_NP.tolist()
            places += layout.slots_NP.flatten().tolist()
            assert sorted(places) == list(range(used))
            assert [image[:2] for image in piece["images"]] == [[tile_size, tile_size]] * len(layout.slots_NP)


def texts(article: dict[str, Any], *roles: str) -> str:
    return "".join(t for piece in article["pieces"] for role, _, t in piece["tokens"] if not roles or role in roles)


def test_captions_and_an_attack(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Text that would end its element, run a script or fetch a picture stands there as text."""
    shown = show(browser, sources.captions(tmp_path / "pairs", tokenizer), tokenizer, "data.seq_length=400")
    check_quiet(shown)
    check_agrees(shown)
    assert len(shown.articles) == 5
    attack = shown.articles[1]
    assert '</span></p></article></main><script>window.hacked = 1</script><img src="https://' in texts(attack)
    assert " ‹U+202E› ]]> --> ünïcödé 北京 🏯‹U+0000›␍↵\n</s>" in texts(attack).replace("◌", "")
    assert browser.evaluate("[typeof window.hacked, document.querySelectorAll('script, [onerror]').length]") == [
        "undefined",
        0,
    ]
    assert texts(shown.articles[4]) == "</s>"


def test_the_page_forbids_itself_scripts_and_requests(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Were an escape forgotten, the browser would still run and fetch nothing."""
    prefix = sources.captions(tmp_path / "pairs", tokenizer)
    page = show(browser, prefix, tokenizer).path
    hole = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 2"><p style="color: red" id="hole">'
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{hole}</main>"), encoding="utf-8")
    seen = browser.open(page)
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert browser.evaluate("document.querySelector('#hole').style.color") == ""
    assert sum("Content Security Policy" in message for message in seen.messages) >= 3


@pytest.mark.parametrize("overview", ["after", "before"])
@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_conversations_with_split_images(
    browser: Chromium, tmp_path: Path, tokenizer: Tokenizer, overview: str, decoder: str
) -> None:
    """Tiles, indicators and slots of several images; from three images on none is split."""
    words = (*SPLIT, f"tiling.overview={overview}", f"data.decoder={decoder}", "train.loss_normalisation=sample")
    shown = show(browser, sources.talk(tmp_path / "talk", tokenizer), tokenizer, *words)
    check_quiet(shown)
    check_agrees(shown)
    assert [len(layout.images) for (layout,) in shown.layouts.values()] == [0, 1, 2, 3, 4]
    one, two, three = shown.articles[1:4]
    (layout,) = shown.layouts[2]
    grid = layout.images[1].plan.grid
    indicators = [f"(1,{row},{column})" for row in range(1, grid[0] + 1) for column in range(1, grid[1] + 1)]
    indicators = ["(1,0,0)", *indicators] if overview == "before" else [*indicators, "(1,0,0)"]
    assert texts(two, "indicator").endswith("".join(indicators))
    whole = [alt.endswith("overview") for *_, alt in one["pieces"][0]["images"]]
    assert whole == sorted(whole, reverse=overview == "before")
    assert sum(whole) == 1
    assert texts(three, "indicator") == ""
    assert texts(three, "target") == " This.</s> So.</s>"


def test_a_tile_is_shown_pixel_by_pixel(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """On request: the widest grid of tiles has as many pixels on the screen as in memory."""
    show(browser, sources.talk(tmp_path / "talk", tokenizer), tokenizer, *SPLIT)
    browser.evaluate("document.querySelector('#full').click()")
    sides = browser.evaluate(
        "[...document.querySelectorAll('main .canvas img')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.width, r.height])"
    )
    assert np.abs(np.array(sides) - 56).max() < 0.02


@pytest.mark.parametrize("pictures", ["png", "jpeg"])
def test_boxes_stand_where_the_picture_has_them(
    browser: Chromium, tmp_path: Path, tokenizer: Tokenizer, pictures: str
) -> None:
    """Within a pixel of the view, in the overview and over the grid, and the canvas lies exactly over the tiles."""
    prefix = sources.grounding(tmp_path / "boxes", tokenizer, folder=tmp_path)
    shown = show(browser, prefix, tokenizer, *SPLIT, options=("--pictures", pictures))
    check_quiet(shown)
    check_agrees(shown)
    views = browser.evaluate(RED)
    assert len(views) == 4
    for view in views:
        assert np.abs(np.subtract(view["over"], view["under"])).max() < 0.51
    for view in views[:2]:
        box, whole = view["drawn"]
        assert np.abs(np.subtract(box, view["red"])).max() <= 1
        assert np.abs(whole[:2]).max() == 0
        assert whole[2] > box[2]
    for view in views[2:]:
        (point,) = view["drawn"]
        middle = np.array(view["red"]).reshape(2, 2).mean(axis=0)
        assert np.abs(np.array(point).reshape(2, 2).mean(axis=0) - middle).max() <= 1
    marked = "[...document.querySelectorAll('main article:first-child .text .region[data-n]')]"
    lines = browser.evaluate(f"{marked}.map(e => getComputedStyle(e).borderBottomColor)")
    assert lines == views[0]["colours"]
    assert len(set(lines)) == 2
    browser.evaluate("document.querySelector('#boxes').click()")
    assert browser.evaluate("document.querySelector('.drawn').getClientRects().length") == 0


def test_interleaved_documents_in_pieces(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    shown = show(
        browser, sources.web(tmp_path / "web", tokenizer), tokenizer, "data.max_images=3", "data.seq_length=48"
    )
    check_quiet(shown)
    check_agrees(shown)
    assert all(len(article["pieces"]) > 1 for article in shown.articles[:3])
    assert "3 × too few <words>" in browser.evaluate("document.querySelector('header').textContent")
    for article in shown.articles[:3]:
        for before, piece in zip(article["pieces"][:-1], article["pieces"][1:], strict=True):
            role, title, text = piece["tokens"][0]
            if role == "shared":
                assert title.endswith(" @ 0")
                assert before["tokens"][-1][2] == text
        assert sum(t[0] == "shared" for piece in article["pieces"] for t in piece["tokens"]) >= 1


def test_some_hundred_texts(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = sources.text(tmp_path / "text", tokenizer, documents=600)
    shown = show(browser, prefix, tokenizer, options=("--documents", "300", "--seed", "5"))
    check_quiet(shown)
    check_agrees(shown)
    assert len(shown.articles) == 300
    assert browser.evaluate("document.querySelectorAll('nav a').length") == 300
    links = "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    assert browser.evaluate(links) is True


def test_broken_documents_are_shown_as_broken(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    shown = show(browser, sources.broken(tmp_path / "bad", tokenizer), tokenizer)
    check_quiet(shown)
    check_agrees(shown)
    assert [article["state"] for article in shown.articles] == ["", *["broken"] * 5, "broken", "left out"]
    assert all(article["notes"] for article in shown.articles[1:])
    assert "is replaced by the mean colour" in shown.articles[1]["notes"][0]
    account = browser.evaluate("document.querySelector('#account').textContent")
    assert account.startswith("8 documents (spread over the dataset, seed 0)")
    assert "6 broken" in account


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 400])
def test_everybody_can_read_it(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer, dark: bool, width: int) -> None:
    """Contrast of 4.5 at least, nothing wider than the window, a text for every picture, a label for every switch."""
    prefix = sources.broken(tmp_path / "bad", tokenizer)
    browser.window(width, 900, dark=dark)
    try:
        show(browser, prefix, tokenizer, *SPLIT)
        low = [(round(ratio, 2), what) for ratio, what in browser.evaluate(CONTRAST) if ratio < 4.5]
        assert low == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("[...document.images].every(image => image.alt)") is True
        assert browser.evaluate("[...document.querySelectorAll('input')].every(e => e.labels.length === 1)") is True
        page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (page == "rgb(246, 247, 249)") == (not dark)
    finally:
        browser.window(1200, 900)


def test_named_documents_and_a_run_of_files(browser: Chromium, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The run comes from yaml as the trainer reads it, its tokenizer too."""
    prefix = sources.text(tmp_path / "text", tokenizer, documents=30)
    run = {"preset": "debug_dense", "data": {"seq_length": 40, "tokenizer": str(tokenizer.path)}}
    (tmp_path / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    page = tmp_path / "deep" / "page.html"
    words = ["--html", str(page), "--documents", "20,3-4", "--pieces", "2", "--config", str(tmp_path / "run.yaml")]
    assert load_tool("inspect_dataset").main([*words, str(prefix)]) == 0
    browser.open(page)
    articles = browser.evaluate(READ)
    assert [article["document"] for article in articles] == [20, 3, 4]
    assert len(articles[0]["pieces"]) == 2
    assert "more pieces are not shown" in browser.evaluate("document.querySelector('article').textContent")
    assert f"40 file {tmp_path / 'run.yaml'}" in browser.evaluate("document.querySelector('header').textContent")
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html"]
