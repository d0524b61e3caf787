#!/usr/bin/env bash
# Learning rates of a starting point, on the validation prompts alone, one seed that no arm of the study has:
#
#     bash choose.sh under "5e-4 1e-3 2e-3"
set -euo pipefail
cd "$(dirname "$0")"
for arm in sft sft_compute soar; do
  for lr in $2; do
    corefit run "$1.toml" --only "$arm" --set "name=choose-$1-$arm-$lr" --set seed=1000 \
      --set eval.prompts=validation.jsonl --set "stage.$arm.optimizer.lr=$lr" \
      --set eval.also.prompts=1 --set eval.diversity.prompts=1 --set eval.drift.samples=2
  done
done
