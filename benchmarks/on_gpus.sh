#!/usr/bin/env bash
# The GPU rows of docs/RESULTS.md, "What a run costs", "Several GPUs" and "Start-up and loading", on all GPUs of this host: first what
# needs several, alone on the host, then one run a GPU.
#   PYTHON=.venv/bin/python bash benchmarks/on_gpus.sh runs/gpus [PART...]    # rows and logs there; parts: several compiled pairs four single
# With two GPUs of 80 GB or more; some 35 minutes. EXACT=1: several in fp32 as well.
set -u
count=${GPUS:-$(nvidia-smi -L | wc -l)} out=$(realpath -m "$1") || exit
shift
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
parts=${*:-several compiled pairs four single}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# run GPUS NAME SCRIPT ARGUMENTS...: its rows in NAME.json, what it says in NAME.log
run() {
  local gpus=$1 name=$2 script=$3
  shift 3
  CUDA_VISIBLE_DEVICES=$gpus TORCHINDUCTOR_CACHE_DIR=$out/kernels-$name timeout "${LIMIT:-900}" \
    "$python" "benchmarks/$script.py" "$@" --rows "$out/$name.json" > "$out/$name.log" 2>&1
  echo "$name ended with $? at $(date +%T)"
}
cost() { run "$1" "$2" cost "${@:3}" --out "$out/$2"; }
scale() { run "$1" "$2" scale llama-3-8b "${@:3}" --out "$out/$2"; }

# alone on the host: a sharded step suffers from what else its host does
several() {
  local exact=(--batch 2 --window 512 --search 2 --recover 3 --prior 16 model.dtype=float32 train.precision=float32)
  scale 0,1 scale --processes 2
  [ -z "${EXACT:-}" ] || scale 0,1 scale-exact --processes 2 "${exact[@]}"
}

# compiled layers, and on two other cards what is of one
compiled() {
  local two=0 three=1
  [ "$count" -ge 4 ] && two=2 three=3
  scale 0,1 scale-compiled train.compile=true --processes 2 --ways one none &
  [ "$count" -ge 4 ] || wait
  cost $two pair-16 llama-3-8b --steps 200 --search 10 --prior 16 --name 'ten steps' &
  run $three compiling compiling llama-3-8b --ways fp32 eager symbolic &
  wait
}

# dense LoRA and the default search, of twice the usual length
pairs() {
  local default=(llama-3-8b --steps 400 --search 20 --prior 16 --what atp) two=0 three=1
  [ "$count" -ge 4 ] && two=2 three=3
  cost 0 lora-400 llama-3-8b --steps 400 --what lora &
  cost 1 default-400 "${default[@]}" --name default &
  [ "$count" -ge 4 ] || wait
  cost $two eager-400 "${default[@]}" --name 'default, eager' train.compile=false &
  { cost $three profile llama-3-8b --steps 60 --profile; run $three growth growth llama-3-8b --layers 8; } &
  wait
}

four() {
  [ "$count" -lt 4 ] || scale 0,1,2,3 scale-4 --processes 4
}

single() {
  cost 0 pair llama-3-8b --steps 200 &
  { cost 1 default llama-3-8b --steps 200 --search 20 --prior 16 --what atp --name default
    cost 1 compiled llama-3-8b --steps 200 --what atp --name compiled train.compile=true; } &
  wait
  cost 0 small qwen3-1.7b --steps 60 &
  cost 1 qlora-auto llama-3-8b --steps 60 --what atp --name qlora-auto model.quantize=nf4 &
  wait
  run 0 locking locking llama-3-8b
  run 0 loading loading llama-3-8b --device cuda --only load tune
}

for part in $parts; do
  "$part"
done
echo "all done"
