"""Compare the golden text of every preset, or write it anew with --update; read the difference before committing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm15_megatron.presets import REGISTRY

FOLDER = Path(__file__).parent / "presets"


def stale_presets(folder: Path) -> list[str]:
    """Return the presets whose golden text is absent or differs, and the texts that belong to no preset."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    changed = [name for name, preset in REGISTRY.items() if found.get(name) != preset.text()]
    return changed + sorted(set(found) - set(REGISTRY))


def update(folder: Path) -> None:
    """Write every golden text and remove those that belong to no preset."""
    for path in folder.glob("*.txt"):
        if path.stem not in REGISTRY:
            path.unlink()
    for name, preset in REGISTRY.items():
        (folder / f"{name}.txt").write_text(preset.text(), encoding="utf-8")


def main() -> int:
    """Run the command line; the exit status is 1 if a text is stale and was not updated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the texts of today's presets")
    wanted = parser.parse_args()
    stale = stale_presets(FOLDER)
    if wanted.update:
        update(FOLDER)
    for name in stale:
        sys.stdout.write(f"{'updated' if wanted.update else 'stale'}: {name}\n")
    return 1 if stale and not wanted.update else 0


if __name__ == "__main__":
    sys.exit(main())
