#!/usr/bin/env bash
# The quickstart's datasets from its files, by the tools that make any dataset: preprocess.sh FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
FILES=$1/files DATA=$1/data
shared=(--tokenizer "$DATA/tokenizer.json" --on-bad-image raise)

"$PYTHON" tools/preprocess_captions.py jsonl "$FILES/captions.jsonl" --output "$DATA/captions" "${shared[@]}"
"$PYTHON" tools/preprocess_interleaved.py positioned "$FILES/interleaved.jsonl" --image-folder "$FILES" --output "$DATA/interleaved" "${shared[@]}"
"$PYTHON" tools/preprocess_text.py jsonl "$FILES/text.jsonl" --output "$DATA/text" "${shared[@]}"
for name in conversations heldout; do
    "$PYTHON" tools/preprocess_sft.py llava "$FILES/$name.json" --image-root "$FILES" --output "$DATA/$name" "${shared[@]}"
done
