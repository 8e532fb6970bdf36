#!/bin/sh
# ViT-B/32 on DataComp-medium, 8 GPUs of one machine. Settings: scale "medium" of DataComp (scale_configs.py: batch 4096, lr 5e-4, 500
# steps of warm-up, 128 M samples). Expected: zero-shot ImageNet top-1 17.6 % unfiltered, 29.7 % with the best filter of the paper,
# CLIP score and image clusters (Gadre et al. 2023, table 3, arXiv:2304.14108). Expected cost: plan=8xa100-40gb. Not run by us.
#
#   DATA='/data/medium/shards/{00000000..00013103}.tar' sh scripts/pretrain_datacomp_medium_b32.sh
#   sh scripts/pretrain_datacomp_medium_b32.sh plan=8xa100-40gb
#
# The pool comes as links: DataComp's own scripts fetch it with img2dataset (download_upstream.py --scale medium) and write the shards
# of a filter's choice (resharder.py).
set -e
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else restarted ranks cannot meet (torch 2.15)
case " $* " in *" plan="*) RUN=clipkit ;; *) RUN="torchrun --nproc-per-node=${GPUS:-8} --max-restarts=3 -m clipkit" ;; esac
exec $RUN pretrain experiment=datacomp_medium_b32 data.train="${DATA:-not-here.tar}" "$@"
