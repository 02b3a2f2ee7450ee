"""The loaders that ours is held against: WebDataset in a torch ``DataLoader``, and megatron-energon.

Both read shards of ``NAME.jpg`` and ``NAME.ids`` (int32 token ids, as our dataset stores them), decode, resize and
normalise with Pillow and torch, and stack so many samples into a batch; they neither tokenise nor pack nor shuffle.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from mm15_megatron.bench.data.image_paths import TileRule, pillow_pixels, pillow_tiles
from mm15_megatron.bench.data.pictures import Picture
from mm15_megatron.errors import BackendError

_SHARDS: Final = 8
_ENERGON: Final = "from megatron.energon.cli.main import main; main()"


def write_shards(folder: Path, pairs: Sequence[tuple[Picture, Sequence[int]]]) -> list[Path]:
    """Write pairs of picture and ids as shards, dealt in turn; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shard-{number:05d}.tar" for number in range(min(_SHARDS, len(pairs)))]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for index in range(number, len(pairs), len(paths)):
                picture, ids = pairs[index]
                _add(archive, f"{index:08d}.jpg", picture.encoded)
                _add(archive, f"{index:08d}.ids", np.asarray(ids, np.int32).tobytes())
    return paths


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tiles_and_ids(encoded: bytes, ids: bytes, *, rule: TileRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 [tiles, 3, side, side] and int64 [tokens] of one sample."""
    return pillow_tiles(pillow_pixels(encoded), rule), torch.from_numpy(np.frombuffer(ids, np.int32).astype(np.int64))


def stacked(samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tiles of all samples, float32 [tiles, 3, side, side], and their ids, int64, padded with -1."""
    ids = torch.nn.utils.rnn.pad_sequence([one for _, one in samples], batch_first=True, padding_value=-1)
    return torch.cat([tiles for tiles, _ in samples]), ids


class _Sample:
    """From a sample of WebDataset to tensors; picklable."""

    def __init__(self, rule: TileRule) -> None:
        self._rule = rule

    def __call__(self, sample: tuple[bytes, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(1)
        return tiles_and_ids(*sample, rule=self._rule)


def webdataset_batches(
    shards: Sequence[Path], *, rule: TileRule, images: int, workers: int, prefetch: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of ``images`` samples without end.

    Raises:
        BackendError: WebDataset cannot be imported.
    """
    try:
        import webdataset
    except ImportError as error:
        raise BackendError(f"webdataset cannot be imported: {error}", fix="pip install webdataset") from error
    dataset = (
        webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)
        .to_tuple("jpg", "ids")
        .map(_Sample(rule))
        .batched(images, collation_fn=stacked, partial=False)
        .repeat()
    )
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=prefetch)


def prepare_energon(folder: Path) -> None:
    """Write what megatron-energon keeps beside shards, by its own command.

    Raises:
        BackendError: it cannot be imported, or failed.
    """
    words = [sys.executable, "-c", _ENERGON, "prepare", "--non-interactive", "--no-progress", "--split-ratio", "1,0,0"]
    words += ["--sample-type", "CrudeWebdataset", "--num-workers", "1", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"megatron-energon cannot prepare the shards: {last}", fix="pip install megatron-energon")


def energon_batches(
    folder: Path, *, rule: TileRule, images: int, workers: int, prefetch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of ``images`` samples without end, from shards that :func:`prepare_energon` went over.

    Raises:
        BackendError: megatron-energon cannot be imported.
    """
    try:
        from megatron import energon
    except ImportError as error:
        raise BackendError(
            f"megatron-energon cannot be imported: {error}", fix="pip install megatron-energon"
        ) from error

    @energon.stateless
    def cooked(sample: dict[str, Any]) -> Any:
        return energon.TextSample(**energon.basic_sample_keys(sample), text=(sample["jpg"], sample["ids"]))

    class Pairs(energon.TaskEncoder):
        decoder = None
        cookers = [energon.Cooker(cooked)]

        @energon.stateless
        def encode_sample(self, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
            torch.set_num_threads(1)
            return tiles_and_ids(*sample.text, rule=rule)

        @energon.stateless
        def batch(self, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
            return stacked(samples)

    dataset = energon.get_train_dataset(
        folder,
        batch_size=images,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=Pairs(),
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
    )
    return iter(energon.get_loader(dataset, prefetch_factor=prefetch))
