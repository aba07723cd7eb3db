#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes; results under $OUT or benchmarks/out.
#   bash benchmarks/gpu.sh [DATA]     DATA as in benchmarks/real_run.py
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
out=${OUT:-benchmarks/out}
work=${WORK:-/tmp/chinese_llama_gpu}
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:${PYTHONPATH:-}" HF_HUB_OFFLINE=1
{
    python3 -c "import torch, transformers, peft; print('device:', torch.cuda.get_device_name(), '| torch', torch.__version__, '| transformers', transformers.__version__, '| peft', peft.__version__)"
    date -u +%F
} | tee "$out/device.txt"
python3 -m pytest -q -m gpu tests 2>&1 | tee "$out/tests.txt"
python3 -m benchmarks.big --tokenizer "$data/tokenizers/llama/tokenizer.model" --chinese-sp "$data/tokenizers/chinese_sp.model" \
    --corpus "$data/zh_pretrain.jsonl.gz" --work "$work/big" 2> >(tee "$out/big.log" >&2) | tee "$out/big.md"
rm -rf "$work/big"
python3 -m benchmarks.real_run --data "$data" --work "$work/real" --batch 64 --block 512 --pt-steps 400 --sft-steps 200 \
    2> >(tee "$out/real.log" >&2) | tee "$out/real.md"
cp -r "$work/real/report" "$out/"
