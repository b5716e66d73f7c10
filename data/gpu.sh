#!/usr/bin/env bash
# What one GPU shows, part by part:  gpu.sh PART IMAGENETTE [OUT]
#   bench     images/s, memory and share of the matrix rate, beside the plain loop: ViT-S/16 and the small-picture preset
#   tables    the component and the teacher table, one seed; SEEDS=3 for more, STEPS=14800 for runs of another length
#   weights   a small ViT to ship, with snapshots, its report and its course
#   best      ViT-S/8 at 128 pixels: the highest k-NN that Imagenette gives
#   siamese   Siamese Image Modeling beside DINO and a masked autoencoder
#   transfer  the encoders of weights and best, fine-tuned
# IMAGENETTE is its folder or archive, DAVIS (if set) that of DAVIS-2016. Results are added to OUT/rows.jsonl, runs lie in OUT/runs.
# It stops by itself after MINUTES (9), with status 75 if something is left to do: the same command goes on from there.
# MORE holds further options for every run, such as "--steps 4 --device cpu". It needs no installation: PYTHONPATH=. data/gpu.sh ...
set -uo pipefail
part=${1:?which part: bench, tables, weights, best, siamese or transfer}
pictures=${2:?where Imagenette lies: a folder or an archive}
out=${3:-runs/gpu}
read -ra more <<< "${MORE:-}"
mkdir -p "$out"

run() {  # a command of dino-edu, in what is left of the time
  local left=$((${MINUTES:-9} * 60 - SECONDS)) status=0
  if [ "$left" -gt 5 ]; then
    echo "+ dino-edu $*" >&2
    timeout --signal INT --kill-after 60 "$left" python3 -m dino_edu.cli "$@" || status=$?
  fi
  if [ "$left" -le 5 ] || [ "$status" = 124 ] || [ "$status" = 137 ]; then
    echo "gpu.sh: time is up, run the same again" >&2
    exit 75
  fi
  [ "$status" = 0 ] || exit "$status"
}

once() {  # the same, unless it was done before: a name for it, then the command
  local done=$out/$1.done
  shift
  [ -e "$done" ] || { run "$@"; touch "$done"; }
}

table() {  # of the laboratory
  run ablate "$@" --base imagenette --data "$pictures" --cache "$out/cache" --jobs "${JOBS:-3}" --seeds "${SEEDS:-1}" \
    --out "$out" --runs "$out/runs" ${STEPS:+--steps "$STEPS"} "${more[@]}"
}

learn() {  # a run with a name, then its judgement
  local name=$1
  shift
  once "$name" train imagenette --data "$pictures" --cache "$out/cache" --out "$out/$name" --snapshots 20 \
    --record "$out/rows.jsonl" --table real --save-every 200 "$@" "${more[@]}"
  once "$name-score" score "$out/$name" --data "$pictures" --protocols all ${DAVIS:+--davis "$DAVIS"} --out "$out/$name-report"
  [ -z "${DAVIS:-}" ] || once "$name-segment" segment "$out/$name" --data "$DAVIS" --patches --record "$out/rows.jsonl" --row "$name" --base imagenette \
    --out "$out/$name-segment.png"
}

case $part in
  bench)
    once bench-vits16 bench imagenet_vits16 --batch 256 --n-local 8 --json "$out/bench_vits16.json" --record "$out/rows.jsonl" "${more[@]}"
    once bench-vits16-compiled bench imagenet_vits16 --batch 256 --n-local 8 --compile --json "$out/bench_vits16_compiled.json" --record "$out/rows.jsonl" "${more[@]}"
    once bench-tiny bench imagenette --json "$out/bench_tiny.json" --record "$out/rows.jsonl" "${more[@]}"
    once bench-tiny-compiled bench imagenette --compile --json "$out/bench_tiny_compiled.json" --record "$out/rows.jsonl" "${more[@]}"
    ;;
  tables)
    table component
    table teacher
    ;;
  weights)
    learn weights --epochs 800 --momentum 0.998
    ;;
  best)
    learn best --encoder vit_small --picture-size 128 --global-size 128 --local-size 64 --n-local 8 --drop-path 0.1 --epochs 300 --momentum 0.996
    ;;
  siamese)
    table siamese --rows dino mae siamese_im as_published
    ;;
  transfer)
    run transfer imagenet --data "$pictures" --picture-size 128 --size 128 --weights weights="$out/weights" best="$out/best" --batch 128 --epochs 100 \
      --rates 1e-4 5e-4 --out "$out/transfer" --record "$out/rows.jsonl" "${more[@]}"
    ;;
  *)
    echo "gpu.sh: no part $part: there are bench, tables, weights, best, siamese and transfer" >&2
    exit 2
    ;;
esac
echo "gpu.sh: $part is done" >&2
