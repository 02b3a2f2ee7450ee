"""Caption shards, in the layout that img2dataset writes."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.data.formats.base import Caption, Found, Skipped
from mm15_megatron.data.formats.tar_samples import TarCut, members, samples, split_name
from mm15_megatron.data.formats.webdataset import WebDatasetCaptions
from mm15_megatron.errors import DataError
from tests.data.images import photo

Files = Iterable[tuple[str, bytes]]


def write_tar(path: Path, files: Files) -> Path:
    """Write members as webdataset's writer does: USTAR headers, in the order given."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shard_sample(number: int, *, suffix: str = "jpg", **changes: Any) -> list[tuple[str, bytes]]:
    """Members of one sample, sorted by name, with every field of img2dataset's JSON."""
    key = f"{number:09d}"
    metadata = {
        "url": f"https://example.org/{key}.jpg",
        "caption": f"caption {number}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 16,
        "original_width": 48,
        "original_height": 32,
        "exif": "{}",
        "sha256": "0" * 64,
    } | changes
    image = photo(16, 24, seed=number, form={"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    text = metadata["caption"] if metadata["caption"] is not None else ""
    return sorted(
        [
            (f"{key}.{suffix}", image),
            (f"{key}.json", json.dumps(metadata, indent=4).encode()),
            (f"{key}.txt", text.encode()),
        ]
    )


def read(reader: WebDatasetCaptions) -> list[Found | Skipped]:
    return [record for unit in reader.units() for record in reader.read(unit)]


def found(number: int, *, shard: str = "00000.tar", suffix: str = "jpg", text: str | None = None) -> Found:
    files = dict(shard_sample(number, suffix=suffix))
    image = files[f"{number:09d}.{suffix}"]
    return Found(Caption(image, text or f"caption {number}"), f"{shard}:{number:09d}")


def test_a_shard_gives_its_pairs_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "00001.tar", shard_sample(10000, suffix="webp") + shard_sample(10001, suffix="png"))
    write_tar(tmp_path / "00000.tar", shard_sample(3) + shard_sample(1, caption="  ein Hündchen\n"))
    (tmp_path / "00000.parquet").write_bytes(b"not read")
    (tmp_path / "00000_stats.json").write_text("{}")
    reader = WebDatasetCaptions((tmp_path,))
    assert reader.kind == "captions"
    assert [unit.path.name for unit in reader.units()] == ["00000.tar", "00001.tar"]
    wanted = [
        found(3),
        found(1, text="ein Hündchen"),
        found(10000, shard="00001.tar", suffix="webp"),
        found(10001, shard="00001.tar", suffix="png"),
    ]
    assert read(reader) == wanted
    again = pickle.loads(pickle.dumps(reader))
    assert again == reader
    assert [list(again.read(unit)) for unit in reversed(reader.units())] == [wanted[2:], wanted[:2]]


def test_what_cannot_be_used_is_left_out_by_reason(tmp_path: Path) -> None:
    files = [
        *shard_sample(0, status="failed_to_download"),
        *shard_sample(1, status="failed_to_resize"),
        *shard_sample(2, status="someone else's word"),
        *shard_sample(3)[:2],
        *shard_sample(4)[1:],
        *shard_sample(5, caption=None),
        *shard_sample(6, caption=" \n"),
        *shard_sample(7)[:2],
        ("000000007.txt", b"\xff\xfe"),
        *shard_sample(8),
        ("000000008.png", b"a second image"),
        *shard_sample(9, status=None),
    ]
    write_tar(tmp_path / "00000.tar", files)
    *skipped, last = read(WebDatasetCaptions((tmp_path / "00000.tar",)))
    reasons = [
        "status failed_to_download",
        "status failed_to_resize",
        "status is not success",
        "no caption",
        "no image",
        "empty caption",
        "empty caption",
        "caption is not Unicode",
        "several images",
    ]
    assert skipped == [Skipped(reason, f"00000.tar:{number:09d}") for number, reason in enumerate(reasons)]
    assert last == found(9)


def test_plain_shards_need_no_json(tmp_path: Path) -> None:
    files = [
        ("./train/a.JPG", b"A"),
        ("./train/a.seg.png", b"not an image of the pair"),
        ("./train/a.txt", b"\xef\xbb\xbfa cat"),
        ("train/._a.jpg", b"a leftover of macOS"),
        ("README", b"no ending"),
        ("train/b.cls", b"7"),
        ("train/b.png", b"B"),
        ("train/b.txt", b"a dog"),
        ("other/b.png", b"C"),
        ("other/b.txt", b"a fox"),
    ]
    write_tar(tmp_path / "x.tar", files)
    assert read(WebDatasetCaptions((tmp_path,))) == [
        Found(Caption(b"A", "a cat"), "x.tar:train/a"),
        Found(Caption(b"B", "a dog"), "x.tar:train/b"),
        Found(Caption(b"C", "a fox"), "x.tar:other/b"),
    ]
    assert split_name("a/b.c/d.tar.GZ") == ("a/b.c/d", "tar.gz")
    assert split_name(".hidden") is None


def test_captions_from_another_member_or_a_field(tmp_path: Path) -> None:
    files = [
        *shard_sample(0, synthetic="a puppy"),
        *shard_sample(1, synthetic=None),
        *shard_sample(2, synthetic=""),
        *shard_sample(3, synthetic="half \ud800"),
        ("000000004.jpg", b"no json"),
        ("000000005.jpg", b"E"),
        ("000000005.json", json.dumps({"synthetic": "a kitten"}).encode()),
    ]
    write_tar(tmp_path / "00000.tar", files)
    assert read(WebDatasetCaptions((tmp_path,), caption_field="synthetic")) == [
        found(0, text="a puppy"),
        Skipped("no caption", "00000.tar:000000001"),
        Skipped("empty caption", "00000.tar:000000002"),
        Skipped("caption is not Unicode", "00000.tar:000000003"),
        Skipped("no caption", "00000.tar:000000004"),
        Found(Caption(b"E", "a kitten"), "00000.tar:000000005"),
    ]
    with pytest.raises(DataError, match=r"000000000\.json has no field 'synthetik'\n.*did you mean 'synthetic'"):
        read(WebDatasetCaptions((tmp_path,), caption_field="synthetik"))
    write_tar(tmp_path / "00000.tar", shard_sample(0, synthetic=7))
    with pytest.raises(DataError, match="'synthetic' is a int, not a text"):
        read(WebDatasetCaptions((tmp_path,), caption_field="synthetic"))
    write_tar(tmp_path / "00000.tar", [("a.img", b"A"), ("a.caption", b"words")])
    assert read(WebDatasetCaptions((tmp_path,), caption_suffix="caption", image_suffixes=("img",))) == [
        Found(Caption(b"A", "words"), "00000.tar:a")
    ]


def test_an_empty_shard_is_sound(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [])
    assert read(WebDatasetCaptions((tmp_path,))) == []


def cuts(path: Path, files: Files) -> dict[str, int]:
    """Interesting lengths of the archive of three samples, by name."""
    write_tar(path, files)
    with tarfile.open(path) as archive:
        starts = {member.name: (member.offset, member.offset_data, member.size) for member in archive}
    third, data, size = starts["000000002.jpg"]
    text, text_data, text_size = starts["000000002.txt"]
    assert text_size < tarfile.BLOCKSIZE
    return {
        "nothing": 0,
        "inside the first header": 100,
        "before the third sample": third,
        "inside the header of the third sample": third + 17,
        "inside the image of the third sample": data + size // 2,
        "before the text of the third sample": text,
        "inside the text of the third sample": text_data + 3,
        "inside the padding of the text": text_data + text_size + 1,
        "before the end marker": text_data + tarfile.BLOCKSIZE,
        "inside the end marker": text_data + tarfile.BLOCKSIZE + 10,
    }


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ("nothing", 0),
        ("inside the first header", 0),
        ("before the third sample", 2),
        ("inside the header of the third sample", 2),
        ("inside the image of the third sample", 2),
        ("before the text of the third sample", 2),
        ("inside the text of the third sample", 2),
        ("inside the padding of the text", 3),
        ("before the end marker", 3),
        ("inside the end marker", 3),
    ],
)
def test_a_truncated_shard(tmp_path: Path, cut: str, kept: int) -> None:
    path = tmp_path / "00000.tar"
    length = cuts(path, shard_sample(0) + shard_sample(1) + shard_sample(2))[cut]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"00000\.tar ends (without end marker|inside '000000002\.(jpg|txt)')"):
        read(WebDatasetCaptions((path,)))
    records = read(WebDatasetCaptions((path,), truncated="skip"))
    assert records == [*(found(number) for number in range(kept)), Skipped("truncated shard", "00000.tar")]


def test_every_length_is_a_cut_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_tar(path, [(f"{n}.{suffix}", b"x" * 700) for n in range(2) for suffix in ("jpg", "txt")])
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip(b"\0")), 97):
        path.write_bytes(whole[:length])
        reader = WebDatasetCaptions((path,), truncated="skip")
        *records, last = read(reader)
        assert last == Skipped("truncated shard", "00000.tar")
        assert records == [Found(Caption(b"x" * 700, "x" * 700), f"00000.tar:{n}") for n in range(len(records))]


def test_broken_archives_are_errors(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", shard_sample(0) + shard_sample(1))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmember("000000001.jpg").offset
    reader = WebDatasetCaptions((path,), truncated="skip")

    path.write_bytes(whole[:second] + b"\x55" * 512 + whole[second + 512 :])
    with pytest.raises(DataError, match=f"no member begins at byte {second}"):
        read(reader)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="goes on behind its end marker"):
        read(reader)
    path.write_bytes(b"hello " * 1000)
    with pytest.raises(DataError, match="is not an uncompressed tar"):
        read(reader)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, arcname="a.txt")
    with pytest.raises(DataError, match="is not an uncompressed tar"):
        read(reader)


def test_a_member_that_claims_an_impossible_size_is_no_reason_to_read_it(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = 2**40
    path = tmp_path / "00000.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(TarCut, match=re.escape("a.jpg")):
        list(members(path, wanted=lambda name: True, largest=2**50))
    member.size = 0
    member.pax_headers = {"size": "-1024"}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match="impossible size"):
        list(samples(path, wanted=lambda suffix: True, largest=2**50))


def test_members_over_the_limit_are_left_out_by_name(tmp_path: Path) -> None:
    files = [
        ("a.jpg", b"A" * 100),
        ("a.txt", b"x" * 101),
        ("b.jpg", b"B" * 100),
        ("b.txt", b"x"),
        ("b.raw", b"r" * 999),
    ]
    path = write_tar(tmp_path / "0.tar", files)
    assert read(WebDatasetCaptions((path,), max_member_bytes=100)) == [
        Skipped("larger than max_member_bytes", "0.tar:a"),
        Found(Caption(b"B" * 100, "x"), "0.tar:b"),
    ]
    with path.open("r+b") as stream:
        stream.truncate(1600)  # a member that is cut off is a cut, whatever its size
    with pytest.raises(DataError, match=r"ends inside 'a\.txt'"):
        read(WebDatasetCaptions((path,), max_member_bytes=100))
    write_tar(path, [("a.jpg", b"A" * 101), ("b.jpg", b"B"), ("a.txt", b"x"), ("b.txt", b"x")])
    with pytest.raises(DataError, match="do not stand together"):
        read(WebDatasetCaptions((path,), max_member_bytes=100))


def test_samples_that_are_torn_apart_are_an_error(tmp_path: Path) -> None:
    files = [member for number in range(3) for member in shard_sample(number)]
    files.sort(key=lambda member: member[0].partition(".")[2])
    write_tar(tmp_path / "00000.tar", files)
    with pytest.raises(DataError, match="members of sample '000000000' do not stand together"):
        read(WebDatasetCaptions((tmp_path,)))
    write_tar(tmp_path / "00000.tar", [*shard_sample(0), *shard_sample(0)])
    with pytest.raises(DataError, match=r"holds 000000000\.jpg twice"):
        read(WebDatasetCaptions((tmp_path,)))


@pytest.mark.parametrize(("data", "problem"), [(b"{", "is not JSON"), (b"[]", "holds a list, not an object")])
def test_metadata_that_is_not_an_object_is_an_error(tmp_path: Path, data: bytes, problem: str) -> None:
    write_tar(tmp_path / "00000.tar", [("a.jpg", b""), ("a.json", data), ("a.txt", b"x")])
    with pytest.raises(DataError, match=rf"00000\.tar: a\.json {problem}"):
        read(WebDatasetCaptions((tmp_path,)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"truncated": "ignore"}, "truncated is 'ignore'"),
        ({"max_member_bytes": 0}, "max_member_bytes is 0"),
        ({"caption_field": ""}, "caption_field is empty"),
        ({"caption_suffix": "jpg"}, "the suffixes are"),
        ({"image_suffixes": ()}, "the suffixes are"),
        ({"image_suffixes": (".jpg",)}, "without dot"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        WebDatasetCaptions((tmp_path,), **options)


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file that ends in .tar"):
        WebDatasetCaptions((tmp_path,)).units()
