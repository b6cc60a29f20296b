#!/usr/bin/env bash
# The main job on this machine, end to end; no network is needed after the install.
#   scripts/quickstart.sh [--corpus SOURCE] [--out DIR]
# SOURCE as in scripts/prepare.py, python-docs if nothing is said. Everything goes below DIR (quickstart/KIND).
# The same command again goes on where it stopped, and is quick where it has finished.
set -euo pipefail
usage() {
  sed -n '2,5s/^# \{0,1\}//p' "$0"
}
corpus=python-docs out=
while [ $# -gt 0 ]; do
  case $1 in
    --corpus | --out)
      [ $# -ge 2 ] || { echo "error: $1 needs a value; see scripts/quickstart.sh --help" >&2; exit 2; }
      if [ "$1" = --corpus ]; then corpus=$2; else out=$2; fi
      shift 2
      ;;
    --help | -h) usage; exit 0 ;;
    *) echo "error: unknown argument $1; see scripts/quickstart.sh --help" >&2; exit 2 ;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
kind=${corpus%%:*}
out=$(realpath -m "${out:-$root/quickstart/${kind%-docs}}")
case $corpus in  # a pattern is meant from where the command was given
  *:/*) ;;
  hf:* | hf-stream:*)  # a folder, or else a name on the hub
    name=${corpus#*:}
    [ ! -d "${name%%,*}" ] || corpus="${corpus%%:*}:$PWD/$name"
    ;;
  *:*) corpus="${corpus%%:*}:$PWD/${corpus#*:}" ;;
esac
cd "$root"
started=$SECONDS
source scripts/setup.sh
echo "installed after $((SECONDS - started)) s"
started=$SECONDS
say() { printf '\n== %s\n' "$*"; }

say "1. corpus: $corpus"
python scripts/prepare.py "$corpus" --out "$out/corpus" --vocab-size 8192 --tasks 2

# Old processors emulate bf16, which takes several times as long there.
precision=$(python -c 'from earlybert.run import fast_precision; print(fast_precision())' 2>/dev/null)
say "2. pretraining: two processes, ZeRO-2, $precision; the detector draws the ticket"
ranks=$(python -c 'import os; print(min(2, len(os.sched_getaffinity(0))))')
deepspeed --num_accelerators "$ranks" --log_level error \
  --master_port "$(python -c 'from earlybert.lifecycle import free_port; print(free_port())' 2>/dev/null)" \
  scripts/pretrain.py scripts/experiments/quickstart.toml "data.corpus=$out/corpus" "runs=$out/runs" \
  "deepspeed=ds_configs/zero2_$precision.json"

say "3. the ticket"
python scripts/show.py "$out/runs/quickstart/ticket.json" | grep -v distance

say "4. exports"
for form in compact dense; do
  python scripts/export.py "$out/runs/quickstart" --to "$out/$form" --form "$form"
done

say "5. held-out loss and three filled masks"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error python scripts/fill.py "$out/runs/quickstart" --model "$out/dense"

say "done after $((SECONDS - started)) s, the install not counted"
echo "the run:      $out/runs/quickstart   (python scripts/show.py says what it is)"
echo "the models:   $out/compact (true shapes)   $out/dense (loads in stock BertForMaskedLM)"
echo "TensorBoard:  tensorboard --logdir $out/runs/quickstart/tensorboard"
