#!/usr/bin/env bash
# Learning rates of a starting point, on the validation prompts alone, one seed that no arm of the study has:
#
#     bash choose.sh under "5e-4 1e-3 2e-3"                    for sft, sft_compute and soar
#     bash choose.sh curated "3e-4 1e-3 3e-3" reflexflow       for the arms that are named
#
# The scores are in runs/choose-START-ARM-RATE/report.html.
set -euo pipefail
cd "$(dirname "$0")"
start=$1 rates=$2
shift 2
[ $# -gt 0 ] || set -- sft sft_compute soar
prompts=validation.jsonl
[ "$start" != words ] || prompts=words/validation.jsonl
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for arm in "$@"; do
  for lr in $rates; do
    corefit run "$start.toml" --only "$arm" --set "name=choose-$start-$arm-$lr" --set seed=1000 \
      --set "eval.prompts=$prompts" --set "stage.$arm.optimizer.lr=$lr" \
      --set eval.also.prompts=1 --set eval.diversity.prompts=1 --set eval.drift.samples=2
  done
done
