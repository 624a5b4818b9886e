#!/usr/bin/env bash
# Makes guides such as those that ship, from the base and 372 prompts alone, into results/; some hours on two cores. A
# second run goes on where a killed one stopped. Called in the checkout, after `make models` and with the extra `train`.
set -euo pipefail

B=models/smollm2-135m-instruct
G=deploy/guides
R=actors.training.rewards
mkdir -p results

# What a model samples is sampled in two processes, half of the prompts each.
halves() { # prompts, answers, then options of trimtab prefer
  local prompts=$1 answers=$2 half jobs=()
  shift 2
  split -n l/2 -d --additional-suffix=.jsonl "$prompts" results/half-
  for half in 00 01; do
    OMP_NUM_THREADS=1 trimtab prefer --model $B --prompts results/half-$half.jsonl \
      --answers "${answers%.jsonl}-$half.jsonl" --output results/unused-$half.jsonl "$@" &
    jobs+=($!)
  done
  for half in "${jobs[@]}"; do wait "$half"; done
  cat "${answers%.jsonl}"-0[01].jsonl >"$answers"
}

# The base's whole answers, inside which two thirds of the places lie that sentences are sampled at.
halves $G/train_prompts.jsonl results/answers.jsonl --samples 3 --temperature 0.7 --top-p 0.9 --max-tokens 384 \
  --seed 2 --batch 24 --reward $R:sentence_positivity
trimtab contexts --answers results/answers.jsonl --model $B --output results/contexts.jsonl

# Sentences that may come next at each place, and the pairs of them that differ clearly.
halves results/contexts.jsonl results/sentences.jsonl --sentence 14 --max-tokens 48 --samples 6 --top-p 0.95 \
  --seed 3 --batch 16 --reward $R:fresh_positivity
for NAME in positivity plainness; do
  trimtab prefer --model $B --prompts results/contexts.jsonl \
    --answers results/sentences.jsonl --sentence 14 --max-tokens 48 --samples 6 --top-p 0.95 --seed 3 \
    --margin 0.6 --pairs-per-prompt 0 --reward $R:fresh_$NAME --output results/$NAME.jsonl
done

# The guides, and the weights that they bear; each is scaled so that its weight is 1.
train() { # name, price of a nat of KL
  trimtab train --base $B --keep 6 --map-rank 8 --data results/"$1".jsonl --output results/"$1" \
    --steps 36 --batch-size 64 --learning-rate 4e-3 --beta 0.2 --kl "$2" --workers 2 --cpus-per-worker 1
  trimtab calibrate --guide results/"$1" --base $B --prompts $G/calibration_prompts.jsonl --answers 28 \
    --weights 0.25,0.5,0.75,1,1.25 --max-tokens 300 --reward $R:sentence_"$1" --scale
}
train positivity 0.3
train plainness 1.0
echo "adapter/map.safetensors and calibration.json of results/positivity and results/plainness are what lies in $G"
