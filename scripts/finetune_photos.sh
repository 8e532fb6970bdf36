#!/bin/sh
# Fine-tune a CLIP on a folder of class folders (photos/cat/*.jpg, photos/dog/*.jpg, ...), and see whether it helped.
#
#   sh scripts/finetune_photos.sh photos                        # open_clip's ViT-B-32 of LAION-2B, fetched; a GPU, or an hour
#   START=runs/emoji sh scripts/finetune_photos.sh photos       # from a model that is here: no net needed
#
# A fifth of each class is held out. Leaves photos-shards/, runs/photos/ and the table of what was won and forgotten; further
# arguments are settings of clipkit pretrain (train.epochs=20).
# Expected on `python scripts/emoji_folders.py photos` (nine groups of drawings in a style never seen) with START=runs/emoji and
# optim.lr=3e-4, a rate for that small model: the groups 11.4 % -> 55.1 %, emoji_val 68.3 % -> 22.2 %; halfway between the two
# (clipkit interpolate) 42.6 % and 54.1 %. 80 to 170 CPU seconds.
set -eu

photos=${1:?give the folder of class folders}
shift
start=${START:-ViT-B-32}
name=${NAME:-$(basename "$photos")}
pretrained=$([ -e "$start" ] || echo model.pretrained=laion2b_s34b_b79k)
from=$([ -e "$start" ] && echo "model.start=$start" || echo "model=$start")

[ -d "$photos-shards" ] || clipkit shards write "source=$photos" "out=$photos-shards" test_fraction=0.2
clipkit pretrain experiment=finetune_labels "$from" $pretrained "data.train=$photos-shards/train/*.tar" \
    "evaluation.final_tasks=[$photos-shards,emoji_val]" "name=$name" "$@"
