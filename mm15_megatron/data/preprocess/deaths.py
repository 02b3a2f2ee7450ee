"""Documents that ended or stalled the process that read them: what is remembered of a unit, and when it is enough.

A document is left out when this happened twice at the same place; once may be bad luck (the kernel short of memory
takes any process). The file lies beside the part of the unit, so a job that is started again knows of it; it goes with
the parts when the dataset is finished.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mm15_megatron.data.formats.base import Unit
from mm15_megatron.data.preprocess.json_files import write_json
from mm15_megatron.errors import DataError

_LOGGER = logging.getLogger(__name__)
DIED: Final = "reader died"
BETWEEN: Final = ""
"""Stands for the document while the next one is looked for."""
_TWICE: Final = 2
_HINT: Final = "look in the system's log (out of memory? then use fewer workers)"


@dataclass(frozen=True)
class Limits:
    """How much is borne.

    Attributes:
        document_seconds: a document that takes longer is taken for stalled; 0 = none is.
        lost_documents: documents of a unit that may be left out because they end or stall their reader; with one more
            the job ends. 0 = the first such death ends it.
    """

    document_seconds: float = 600
    lost_documents: int = 10

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            DataError: one is negative.
        """
        if not self.document_seconds >= 0 or self.lost_documents < 0:
            raise DataError(
                f"document_seconds is {self.document_seconds}, lost_documents is {self.lost_documents}",
                fix="use 0 or more",
            )


@dataclass(frozen=True)
class Death:
    """A reader that died or was ended.

    Attributes:
        place: number of the document among all that the unit gives.
        where: its name; ``BETWEEN`` = the reader was on its way to it.
        reason: by which it is counted if it is left out.
        seconds: the limit that it ran past; None = it died by itself.
    """

    place: int
    where: str
    reason: str = DIED
    seconds: float | None = None

    @classmethod
    def by_time(cls, place: int, where: str, *, seconds: float) -> Death:
        """Return that of a reader that ran past its time."""
        return cls(place, where, f"reader ran past {seconds:g} s", seconds)


class Deaths:
    """Those of one unit, on disk.

    Args:
        path: the file.
        unit: for messages.
        limits: deaths by a time limit that is lower than the present one do not count.
    """

    def __init__(self, path: Path, unit: Unit, *, limits: Limits) -> None:
        self._path, self._unit, self._limits = path, unit, limits
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self._deaths = [death for death in (Death(**one) for one in told) if self._counts(death)]

    def _counts(self, death: Death) -> bool:
        now = self._limits.document_seconds
        return death.seconds is None or 0 < now <= death.seconds

    @property
    def lost(self) -> dict[int, str]:
        """Reason of each document that is left out, by its place."""
        places = Counter(death.place for death in self._deaths if death.where != BETWEEN)
        return {death.place: death.reason for death in self._deaths if places[death.place] >= _TWICE}

    def add(self, death: Death, *, how: str) -> None:
        """Remember one.

        Args:
            death: of the document that was being read.
            how: what is known of it (``SIGKILL``).

        Raises:
            DataError: it was the second before the same document, or there are too many.
        """
        self._deaths.append(death)
        write_json(self._path, [asdict(one) for one in self._deaths])
        at = _named(death)
        again = sum((one.place, one.where) == (death.place, death.where) for one in self._deaths) >= _TWICE
        if len(self._deaths) > _TWICE * self._limits.lost_documents:
            names = dict.fromkeys(map(_named, self._deaths))
            raise DataError(
                f"{self._unit.name}: its reader died or stalled {len(self._deaths)} times, now {at} ({how});"
                f" all of them: {', '.join(names)}",
                fix=f"{_HINT}, repair or remove these documents, or let more be lost; with {self._path} removed they"
                " are tried again, the same command goes on with the units left",
            )
        if again and death.where == BETWEEN:
            raise DataError(
                f"{self._unit.name}: its reader died or stalled twice {at} ({how})",
                fix=f"{_HINT}; no single document can be left out for it: repair the file, or raise the time limit."
                " The same command goes on with the units left",
            )
        _LOGGER.warning(
            "%s: %s (%s) %s: %s",
            self._unit.name,
            death.reason,
            how,
            at,
            "it is left out" if again else "the unit is read again",
        )


def _named(death: Death) -> str:
    return f"at {death.where}" if death.where != BETWEEN else f"on the way to document {death.place + 1}"
