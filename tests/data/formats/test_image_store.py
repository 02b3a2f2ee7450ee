"""Images by URL and by name: what img2dataset leaves on disk, maps, and everything that may be wrong with them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm15_megatron.data.formats.image_store import ImageFolder, UrlStore
from mm15_megatron.data.formats.sorted_runs import RunWriter, find, key_of, ordered_map, words
from mm15_megatron.data.formats.url_sources import UrlMap, build_url_index
from mm15_megatron.errors import DataError


def write_tar(path: Path, samples: list[tuple[str, bytes, object]], *, json_last: bool = True) -> Path:
    """A shard as img2dataset writes it: key.jpg and key.json; a sample with None has no .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, about in samples:
            members = [(f"{key}.jpg", image)]
            if about is not None:
                raw = about if isinstance(about, bytes) else json.dumps(about, indent=4).encode()
                members.insert(1 if json_last else 0, (f"{key}.json", raw))
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def about(url: str, status: str | None = "success") -> dict[str, object]:
    return {"url": url, "key": "000000000", "status": status, "width": 8, "height": 8, "original_width": 80}


def shards(folder: Path) -> tuple[Path, ...]:
    first = write_tar(
        folder / "00000.tar",
        [
            ("000000000", b"one", about("http://a/1")),
            ("000000001", b"two", about("http://a/2")),
            ("000000002", b"lost", about("http://a/9", status="failed_to_resize")),
            ("000000003", b"bare", None),
        ],
    )
    second = write_tar(
        folder / "00001.tar",
        [("000010000", b"again", about("http://a/1 \n")), ("000010001", b"", about("http://a/3"))],
        json_last=False,
    )
    return first, second


@pytest.mark.parametrize(("workers", "run_records"), [(1, 2**20), (1, 2), (2, 3)])
def test_urls_of_shards_lead_to_their_bytes(tmp_path: Path, workers: int, run_records: int) -> None:
    shards(tmp_path / "images")
    index = tmp_path / "urls.index"
    report = build_url_index(index, tars=(tmp_path / "images",), workers=workers, run_records=run_records)
    assert (report.urls, report.duplicates) == (3, 1)
    assert report.passed_over == {"download failed": 1, "image without a .json": 1}
    store = UrlStore(index)
    for reader in (store, pickle.loads(pickle.dumps(store))):
        assert reader.get("http://a/1") == b"one"  # the first place of two
        assert reader.get(" http://a/2") == b"two"
        assert reader.get("http://a/3") == b""
        assert reader.get("http://a/9") is None
        assert reader.get("http://a/4") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "urls.index"]


def test_the_index_does_not_depend_on_the_size_of_runs(tmp_path: Path) -> None:
    samples = [(f"{i:09d}", f"{i}".encode(), about(f"http://site/{i % 400}")) for i in range(600)]
    write_tar(tmp_path / "0.tar", samples[:350])
    write_tar(tmp_path / "1.tar", samples[350:])
    tars = (tmp_path / "0.tar", tmp_path / "1.tar")
    for records in (7, 100, 10_000):
        report = build_url_index(tmp_path / f"{records}.index", tars=tars, run_records=records)
        assert (report.urls, report.duplicates) == (400, 200)
    assert (tmp_path / "7.index").read_bytes() == (tmp_path / "100.index").read_bytes()
    assert (tmp_path / "7.index").read_bytes() == (tmp_path / "10000.index").read_bytes()
    store = UrlStore(tmp_path / "7.index")
    assert [store.get(f"http://site/{i}") for i in range(400)] == [f"{i}".encode() for i in range(400)]


def test_folders_of_files_and_maps(tmp_path: Path) -> None:
    folder = tmp_path / "files" / "00000"
    folder.mkdir(parents=True)
    (folder / "000000000.jpg").write_bytes(b"loose")
    (folder / "000000000.json").write_text(json.dumps(about("http://f/1")))
    (folder / "000000001.png").write_bytes(b"no json")
    (tmp_path / "files" / "00000_stats.json").write_text("{}")
    write_tar(tmp_path / "t" / "0.tar", [("k", b"member", None)])
    rows = [
        {"url": "http://f/1", "path": "files/00000/000000001.png"},
        {"url": "http://f/2", "path": "files/00000/000000001.png"},
        {"url": "http://f/3", "tar": "t/0.tar", "member": "k.jpg"},
        {"url": "http://f/4", "tar": "t/0.tar", "member": "gone.jpg"},
        {"url": "http://f/5", "path": "gone.jpg"},
    ]
    lines, table = tmp_path / "map.jsonl", tmp_path / "map.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {name: [row.get(name) for row in rows] for name in ("url", "path", "tar", "member")}
    pq.write_table(pa.table(columns), table)
    for path in (lines, table):
        index = tmp_path / f"{path.suffix[1:]}.index"
        report = build_url_index(index, folders=(tmp_path / "files",), maps=(UrlMap(path, tmp_path),))
        assert (report.urls, report.duplicates) == (3, 1)
        assert report.passed_over == {"image without a .json": 1, "file of a map is missing": 2}
        store = UrlStore(index)
        found = [store.get(f"http://f/{i}") for i in range(1, 6)]
        assert found == [b"loose", b"no json", b"member", None, None]


def test_index_and_images_may_move_together(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shards(home / "images")
    build_url_index(home / "urls.index", tars=(home / "images",))
    home.rename(tmp_path / "moved")
    assert UrlStore(tmp_path / "moved" / "urls.index").get("http://a/2") == b"two"


def test_changed_files_are_errors(tmp_path: Path) -> None:
    first, _ = shards(tmp_path / "images")
    build_url_index(tmp_path / "i", tars=(tmp_path / "images",))
    with first.open("ab") as stream:
        stream.write(b"\0" * 512)
    with pytest.raises(DataError, match="when it was indexed"):
        UrlStore(tmp_path / "i").get("http://a/1")
    first.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        UrlStore(tmp_path / "i").get("http://a/1")
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "map.jsonl").write_text('{"url": "http://x", "path": "x.jpg"}')
    build_url_index(tmp_path / "j", maps=(UrlMap(tmp_path / "map.jsonl", tmp_path),))
    (tmp_path / "x.jpg").unlink()
    with pytest.raises(DataError, match="x.jpg cannot be read"):
        UrlStore(tmp_path / "j").get("http://x")


def test_damaged_and_absent_indexes(tmp_path: Path) -> None:
    shards(tmp_path / "images")
    index = tmp_path / "i"
    build_url_index(index, tars=(tmp_path / "images",))
    with pytest.raises(DataError, match="exists"):
        build_url_index(index, tars=(tmp_path / "images",))
    whole = index.read_bytes()
    for bad in (b"", whole[:100], whole[:-1], b"X" + whole[1:], whole[:-3] + b"!!!"):
        index.write_bytes(bad)
        with pytest.raises(DataError, match="not an index"):
            UrlStore(index).get("http://a/1")
    with pytest.raises(DataError, match="does not exist"):
        UrlStore(tmp_path / "none")


def test_malformed_downloads(tmp_path: Path) -> None:
    def fails(match: str, **inputs: object) -> None:
        with pytest.raises(DataError, match=match):
            build_url_index(tmp_path / "i", **inputs)  # type: ignore[arg-type]
        assert not [p for p in tmp_path.iterdir() if p.name.startswith((".i", "i"))]

    good = write_tar(tmp_path / "good.tar", [(f"{i:09d}", b"x" * 2000, about(f"http://{i}")) for i in range(3)])
    whole = good.read_bytes()
    bad = tmp_path / "bad.tar"
    for cut in (whole[:700], whole[:3072], whole[:2560] + b"?" * 512 + whole[3072:], b"no tar" * 300):
        bad.write_bytes(cut)
        fails(r"bad.tar (ends|is broken|is not an uncompressed tar)", tars=(bad,))
    fails("holds no url", tars=(write_tar(tmp_path / "n.tar", [("k", b"x", {"caption": "c"})]),))
    fails("k.json", tars=(write_tar(tmp_path / "j.tar", [("k", b"x", b"{")]),))
    fails("no image with a URL", tars=(write_tar(tmp_path / "e.tar", [("k", b"x", None)]),))
    fails("no image with a URL")
    fails("not a folder", folders=(tmp_path / "none",))
    table = tmp_path / "map.jsonl"
    fails("does not exist", maps=(UrlMap(table, tmp_path),))
    for row, match in (
        ({"link": "http://x", "path": "good.tar"}, "has no url"),
        ({"url": "http://x", "tar": "good.tar"}, "has no url with path, or with tar and member"),
        ({"url": "http://x", "path": "../x"}, "no file below"),
    ):
        table.write_text(json.dumps(row))
        fails(match, maps=(UrlMap(table, tmp_path),))
    fails("not a folder", maps=(UrlMap(table, tmp_path / "none"),))
    (tmp_path / "map.parquet").write_bytes(b"PAR1 or not")
    fails("not parquet", maps=(UrlMap(tmp_path / "map.parquet", tmp_path),))


def test_members_of_absurd_size_are_passed_over(tmp_path: Path) -> None:
    """A .json of 64 MiB is not parsed; an image of 256 MiB is not one."""
    path = write_tar(tmp_path / "0.tar", [("2", b"two", about("http://a/2"))])
    whole = path.read_bytes()
    sizes = {"1.jpg": 3, "1.json": 2**26 + 1, "3.jpg": 2**28 + 1}
    with path.open("wb") as stream:
        for name, size in sizes.items():  # holes, not bytes
            member = tarfile.TarInfo(name)
            member.size = size
            stream.write(member.tobuf())
            stream.seek(-(-size // 512) * 512, 1)
        raw = json.dumps(about("http://a/3")).encode()
        member = tarfile.TarInfo("3.json")
        member.size = len(raw)
        stream.write(member.tobuf() + raw.ljust(512, b"\0") + whole)
    report = build_url_index(tmp_path / "i", tars=(path,))
    assert report.urls == 1
    assert report.passed_over == {"image of more than 256 MiB": 1, "image with a .json of more than 64 MiB": 1}


def test_a_folder_is_not_left(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.jpg").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"s")
    (root / "link").symlink_to(tmp_path)
    folder = pickle.loads(pickle.dumps(ImageFolder(root)))
    assert folder.get("sub/a.jpg") == b"a"
    assert folder.get("sub/../sub/a.jpg") == b"a"
    assert folder.get("b.jpg") is None
    assert folder.get("sub") is None
    assert folder.get("link/secret") == b"s"
    assert folder.get("http://x/" + "long" * 100) is None
    for name in ("../secret", "link/../../secret", str(tmp_path / "secret"), "", ".", "a\0b"):
        with pytest.raises(DataError, match="no file below"):
            folder.get(name)
    with pytest.raises(DataError, match="not a folder"):
        ImageFolder(tmp_path / "none")


def test_runs_are_merged_in_order_and_stable(tmp_path: Path) -> None:
    runs = RunWriter(tmp_path, values=np.dtype(np.int64), run_records=10)
    keys = [key_of(f"{i % 37}".encode()) for i in range(100)]
    for start in range(0, 100, 7):
        part = keys[start : start + 7]
        runs.append(words(part), np.arange(start, start + len(part)))
    pieces = list(runs.merged())
    assert len(pieces) == 10
    values = [v for piece in pieces for v in piece.values_N.tolist()]
    assert values == sorted(range(100), key=lambda i: (keys[i], i))
    high, low = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("high_N", "low_N"))
    assert [values[find(high, low, key)] for key in keys] == [i % 37 for i in range(100)]
    assert find(high, low, key_of(b"other")) == -1
    with pytest.raises(DataError, match="2 keys and 1 values"):
        runs.append(words(keys[:2]), np.arange(1))


def test_fewer_than_one_worker() -> None:
    with pytest.raises(DataError, match="0 workers"):
        list(ordered_map(str, [1, 2], workers=0))
