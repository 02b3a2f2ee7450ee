#!/usr/bin/env bash
# The quickstart from data to report; README.md explains each line. Everything it writes lies in RUN_DIR, which it empties first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-dense}
case $MODEL in
    dense) RANKS=2 DEFAULT_DIR=runs/quickstart ;;
    moe) RANKS=4 DEFAULT_DIR=runs/quickstart_moe ;;
    *) echo "MODEL=$MODEL is not a model of the quickstart: use dense or moe" >&2; exit 2 ;;
esac
RUN_DIR=${RUN_DIR:-$DEFAULT_DIR}
KILL_AT=${KILL_AT:-200}
export OMP_NUM_THREADS=1

if [[ -e $RUN_DIR && ! -e $RUN_DIR/.quickstart ]]; then
    echo "$RUN_DIR was not made by the quickstart and is left alone: set RUN_DIR to a new folder" >&2
    exit 2
fi
rm -rf "$RUN_DIR"
mkdir -p "$RUN_DIR"
touch "$RUN_DIR/.quickstart"
cp "examples/quickstart/$MODEL.yaml" "$RUN_DIR/model.yaml"
for stage in pretrain sft; do
    sed "s#runs/quickstart#$RUN_DIR#" "examples/quickstart/$stage.yaml" > "$RUN_DIR/$stage.yaml"
done

phase() { "$PYTHON" -m examples.quickstart.run_phase --record "$RUN_DIR/phases.jsonl" "$@"; }
ranks() {  # of a job of that many processes
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    ranks=("$PYTHON" -m torch.distributed.run --nproc-per-node "$1" --master-addr 127.0.0.1 --master-port "$port")
}
train=(-m mm15_megatron.train --config "$RUN_DIR/model.yaml")
pretrain=("${train[@]}" --config "$RUN_DIR/pretrain.yaml")
sft=("${train[@]}" --config "$RUN_DIR/sft.yaml")
evaluate=(-m examples.quickstart.evaluate_digits --run-dir "$RUN_DIR/sft" --data "$RUN_DIR/data" --out "$RUN_DIR")

phase --name "write files" -- "$PYTHON" -m examples.quickstart.build_dataset --out "$RUN_DIR"
phase --name preprocess -- bash examples/quickstart/preprocess.sh "$RUN_DIR"

ranks "$RANKS"
phase --name pretrain --terminate-at "$KILL_AT" "$RUN_DIR/pretrain/metrics.jsonl" -- "${ranks[@]}" "${pretrain[@]}" checkpoint.resume=never
ranks "$RANKS"
phase --name "pretrain, resumed" -- "${ranks[@]}" "${pretrain[@]}" checkpoint.resume=required
ranks "$RANKS"
phase --name sft -- "${ranks[@]}" "${sft[@]}" checkpoint.resume=never
ranks 2
phase --name evaluate -- "${ranks[@]}" "${evaluate[@]}"

"$PYTHON" -m examples.quickstart.summarise --run-dir "$RUN_DIR"
