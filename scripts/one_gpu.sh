#!/usr/bin/env bash
# What needs a GPU, on one, in the order of its worth: whole programs beside Trainer (pip install accelerate), a step
# taken apart, the saving with its random ticket, its three models fine-tuned on GLUE and SQuAD 1.1, and the tests.
#   bash scripts/one_gpu.sh GLUE SQUAD OUT [MINUTES]
# GLUE and SQUAD are folders as scripts/finetune.py reads them; corpora/base must be there (README, "What the ticket
# saves"). What is done in OUT stays, and the same command goes on; after MINUTES (60) trainings stop where they are.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '2,6s/^# //p' "$0"; exit 2; }
glue=$(realpath "$1") squad=$(realpath "$2") out=$(realpath -m "$3") minutes=${4:-60}
[ -e corpora/base/manifest.json ] || { echo "error: corpora/base is not there; README, \"What the ticket saves\", has the command that prepares it" >&2; exit 2; }
mkdir -p "$out"

left() { # minutes, at least one hundredth
    python -c "print(max(0.01, $minutes - $SECONDS / 60))"
}
once() { # a file that a command writes, and the command
    local file=$1; shift
    [ -s "$file" ] || "$@"
}

once "$out/train.json" python scripts/bench.py train --shape base --batch 512 --ranks 1 --kind ours-compiled --kind trainer \
    --json "$out/train.json"
for kind in dense shrunken; do
    once "$out/step_$kind.json" python scripts/bench.py step --shape base --batch 768 --ranks 1 --stage 1 --compile --dropout 0 \
        --kind $kind --profile "$out/profile_$kind.txt" --json "$out/step_$kind.json"
done
python scripts/bench.py saving scripts/experiments/base_short.toml phases.0.steps=640 \
    phases.0.batch=768 phases.0.micro_batch=768 ticket.minimum_step=50 ticket.latest_step=50 evaluate.every=20 \
    --out "$out/base_short" --ranks 1 --rates 1e-3 --seeds 1 --share 1.15 --arm dense --arm ticket --arm random --minutes "$(left)" \
    --plot "$out/base.png" --json "$out/saving.json"
if [ -e "$out/base_short/random-0.001-1/done" ]; then
    python scripts/bench.py transfer --glue "$glue" --squad "$squad" --out "$out/tuned" --jobs 12 --seeds 3 --minutes "$(left)" \
        --row "dense: $out/base_short/dense-0.001-1" --row "ticket: $out/base_short/ticket-0.001-1" \
        --row "random: $out/base_short/random-0.001-1" --set recipe.learning_rate=1e-4 \
        --set 'recipes=[{task="sst2", epochs=0.5}, {task="squad", epochs=0.125, sequence_length=128, stride=32}]' \
        --json "$out/tuned.json"
fi
python -m pytest -q -m gpu tests/test_gpu.py 2>&1 | tee "$out/tests.txt"
