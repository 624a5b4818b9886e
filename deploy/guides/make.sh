#!/usr/bin/env bash
# Makes guides such as those that ship, from the base and 372 prompts alone, into results/; some hours on two cores. A
# second run goes on where a killed one stopped. Called in the checkout, after `make models` and with the extra `train`.
set -euo pipefail

B=models/smollm2-135m-instruct
G=deploy/guides
R=actors.training.rewards
mkdir -p results

# The base's whole answers, inside which half of the places lie that sentences are sampled at.
python -m deploy.prefer --model $B --dtype bfloat16 --prompts $G/train_prompts.jsonl --answers results/answers.jsonl \
  --samples 6 --temperature 0.7 --top-p 0.9 --max-tokens 384 --seed 2 \
  --reward $R:sentence_positivity --output results/whole.jsonl
python -m deploy.contexts --answers results/answers.jsonl --model $B --output results/contexts.jsonl

# Eight sentences that may come next at each place, and the pairs of them that differ clearly.
for NAME in positivity plainness; do
  python -m deploy.prefer --model $B --dtype bfloat16 --prompts results/contexts.jsonl \
    --answers results/sentences.jsonl --sentence 14 --max-tokens 48 --samples 8 --top-p 0.95 --seed 3 \
    --margin 0.6 --pairs-per-prompt 0 --reward $R:fresh_$NAME --output results/$NAME.jsonl
done

# The guides, and the weights that they bear.
train() { # name, price of a nat of KL
  python -m deploy.train --base $B --keep 6 --map-rank 8 --data results/"$1".jsonl --output results/"$1" \
    --steps 36 --batch-size 64 --learning-rate 4e-3 --beta 0.2 --kl "$2" --workers 2 --cpus-per-worker 1 \
    "${@:3}"
  python -m deploy.calibrate --guide results/"$1" --base $B --prompts $G/calibration_prompts.jsonl --answers 20 \
    --weights 0.5,0.75,1,1.25,1.5 --max-tokens 300 --reward $R:sentence_"$1"
}
train positivity 0.3
train plainness 1.0
echo "adapter/map.safetensors and calibration.json of results/positivity and results/plainness are what lies in $G"
