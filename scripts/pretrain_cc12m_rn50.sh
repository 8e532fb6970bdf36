#!/bin/sh
# RN50 on CC12M, 8 GPUs of one machine. Expected: zero-shot ImageNet top-1 36.45 % (open_clip's RN50 of CC12M: its release page of
# pretrained weights); of the settings, batch 8 x 128, lr 1e-3, weight decay 0.1 and 10,000 steps of warm-up are those of the sample
# command in its README. Expected cost: plan=8xa100-40gb says 42 GPU hours where 40 % of the peak are reached. Not run by us.
#
#   sh scripts/pretrain_cc12m_rn50.sh                          ready shards of the hub, streamed and kept on disk (about 500 GB)
#   DATA='/data/cc12m/{00000..01242}.tar' sh scripts/pretrain_cc12m_rn50.sh      shards of your own
#   sh scripts/pretrain_cc12m_rn50.sh plan=8xa100-40gb         what it would cost; needs no GPU and no data
#
# The set of the hub has 2,176 shards and 10,968,539 samples (open_clip's README counts the same). Set REVISION to a commit of it, so
# that nobody changes your data. From the links themselves (some 62 to 64 % of them still answer) with img2dataset:
#   img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption --output_format webdataset \
#     --output_folder cc12m --resize_mode keep_ratio --image_size 256 --resize_only_if_bigger true --processes_count 16
set -e
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else restarted ranks cannot meet (torch 2.15)
case " $* " in *" plan="*) RUN=clipkit ;; *) RUN="torchrun --nproc-per-node=${GPUS:-8} --max-restarts=3 -m clipkit" ;; esac
exec $RUN pretrain experiment=cc12m_rn50 \
  data.train="${DATA:-hf://datasets/pixparse/cc12m-wds@${REVISION:-main}/cc12m-train-{0000..2175\}.tar}" \
  data.shard_cache_gb="${CACHE_GB:-600}" "$@"
