"""A function called in a Python process of its own: nothing that one turn imports, maps or starts meets the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from mm15_megatron.errors import BackendError

_ROOT: Final = Path(__file__).resolve().parents[3]
_LAST_LINES: Final = 12


def call(function: str, **arguments: Any) -> dict[str, Any]:
    """Return what ``function(**arguments)`` returns in a fresh process.

    Args:
        function: ``module:name``; arguments and result are JSON.
        arguments: passed on.

    Raises:
        BackendError: it failed; with its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="turn-") as folder:
        result = Path(folder) / "result.json"
        words = [sys.executable, "-m", __name__, function, json.dumps(arguments), str(result)]
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not result.is_file():
            last = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
            raise BackendError(f"{function} ended with {done.returncode}:\n{last}", fix="look at its last lines")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def main() -> None:
    """Answer one call: the function, its arguments as JSON, and the file for the result."""
    function, arguments, result = sys.argv[1:]
    module, _, name = function.partition(":")
    found = import_module(module).__dict__[name](**json.loads(arguments))
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
