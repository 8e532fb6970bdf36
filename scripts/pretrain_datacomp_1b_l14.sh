#!/bin/sh
# ViT-L/14 on DataComp-1B over many machines: one of its processes a GPU, started by Slurm (slurm_pretrain.sbatch) or torchrun.
# Settings: scale "xlarge" of DataComp (scale_configs.py: batch 90,112, lr 1e-3, beta2 0.95, 10,000 steps of warm-up, 12.8 B samples).
# Expected: zero-shot ImageNet top-1 79.2 % (Gadre et al. 2023, arXiv:2304.14108; open_clip's README). Not run by us.
#
#   DATA='s3://bucket/datacomp-1b/{00000000..00139827}.tar' sbatch --nodes=88 scripts/slurm_pretrain.sbatch experiment=datacomp_1b_l14
#   sh scripts/pretrain_datacomp_1b_l14.sh plan=704xa100-40gb
#
# Processes: 88, 176, 352 or 704, for lanes and batch are multiples of these. Fewer are slower, and train the same model.
set -e
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else restarted ranks cannot meet (torch 2.15)
case " $* " in *" plan="*) RUN=clipkit ;; *)
  RUN="torchrun --nnodes=${NODES:?number of machines} --nproc-per-node=${GPUS:-8} --max-restarts=10 --rdzv-backend=c10d
       --rdzv-endpoint=${HEAD:?host name of the first machine} --rdzv-id=${ID:-datacomp} -m clipkit" ;; esac
exec $RUN pretrain experiment=datacomp_1b_l14 data.train="${DATA:-not-here.tar}" "$@"
