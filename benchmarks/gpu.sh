#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes.
#   bash benchmarks/gpu.sh [DATA] [--pico]     DATA as in benchmarks/README.md; --pico (and no GPU): tiny, to try the script
# Tables go to $OUT/RESULTS.md, each part's log to $OUT/PART.log (OUT is benchmarks/out unless set); what is made
# goes to $WORK. A part that fails or passes its time does not cost the others; the exit status tells of it.
# python3 has to have torch with CUDA, what pyproject.toml asks for, bitsandbytes, pytest and hypothesis; nothing is fetched.
set -uo pipefail
cd "$(dirname "$0")/.."
data=../shared/data pico=
for word in "$@"; do
    if [ "$word" = --pico ]; then pico=1; else data=$word; fi
done
out=${OUT:-benchmarks/out}
work=${WORK:-/tmp/chinese_llama_gpu}
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:${PYTHONPATH:-}" HF_HUB_OFFLINE=1
python=$(command -v python3)
"$python" -c 'import torch, transformers, peft, bitsandbytes, pytest, hypothesis' || { echo "python3 lacks a package, see above."; exit 2; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || pico=1
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * (pico ? 4 : 1))) start=$SECONDS status
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null
    status=$?
    [ $status = 0 ] || { failed+=("$name"); tail -n 20 "$out/$name.log"; }
    echo "== $name: $((SECONDS - start)) s, status $status"
}

files=(--tokenizer "$data/tokenizers/llama/tokenizer.model" --chinese-sp "$data/tokenizers/chinese_sp.model"
    --corpus "$data/zh_pretrain.jsonl.gz")
step=(--seconds 180) run=(--batch 128 --block 512 --pt-steps 400 --sft-steps 50 --no-control) # 26 million tokens
if [ -n "$pico" ]; then
    step=(--hidden 64 --layers 2 --heads 2 --block 64 --rounds 1 --contenders ours,token-indices)
    run=(--batch 2 --block 64 --pt-steps 4 --sft-steps 2 --documents 60)
fi
part device 20 "$python" -c 'from benchmarks.record import machine; print(machine())'
cat "$out/device.log"
part tests 100 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py tests/train/test_estimate.py
part train-step 235 "$python" -m benchmarks train-step "${files[@]}" "${step[@]}" --work "$work/step" --results "$out/RESULTS.md"
rm -rf "$work/step"
part real-run 140 "$python" -m benchmarks real-run --data "$data" "${run[@]}" --work "$work/real" --results "$out/RESULTS.md"
rm -rf "$out/report"
if [ -d "$work/real/report" ]; then cp -r "$work/real/report" "$out/"; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see $out"
    exit 1
fi
