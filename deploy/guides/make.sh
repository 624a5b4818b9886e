#!/usr/bin/env bash
# Makes guides such as those that ship, from the base and 400 prompts alone, into results/; some three hours on two cores.
# A second run goes on where a killed one stopped. Called in the checkout, after `make models` and with the extra `train`.
set -euo pipefail

B=models/smollm2-135m-instruct
G=deploy/guides
mkdir -p results

# The base's whole answers, inside which half of the places lie that sentences are sampled at.
python -m deploy.prefer --model $B --dtype bfloat16 --prompts $G/train_prompts.jsonl --answers results/answers.jsonl \
  --samples 6 --temperature 0.7 --top-p 0.9 --max-tokens 384 --seed 2 \
  --reward actors.training.rewards:sentence_positivity --output results/whole.jsonl
python -m deploy.contexts --answers results/answers.jsonl --model $B --output results/contexts.jsonl

# Eight sentences that may come next at each place, and the pairs of them that differ the most.
for R in positivity plainness; do
  python -m deploy.prefer --model $B --dtype bfloat16 --prompts results/contexts.jsonl \
    --answers results/sentences.jsonl --sentence 14 --max-tokens 48 --samples 8 --top-p 0.95 --seed 3 \
    --margin 0.3 --pairs-per-prompt 3 --widest --reward actors.training.rewards:sentence_$R --output results/$R.jsonl
done

for R in positivity plainness; do
  [ -f results/$R/config.json ] || python -m deploy.train --base $B --keep 6 --data results/$R.jsonl \
    --output results/$R --workers 2 --cpus-per-worker 1 --resume @@SETTINGS@@
  python -m deploy.calibrate --guide results/$R --base $B --prompts $G/train_prompts.jsonl --answers 24 \
    --reward actors.training.rewards:sentence_$R
done
echo "results/{positivity,plainness}/adapter and calibration.json are what lies in $G"
