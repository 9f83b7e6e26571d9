#!/bin/sh
# Mixtures of experts: coordinate checks over width, depth and number of experts, then learning rates. Exit codes 1 and 3 are results too.
set -u
check() {
    out=$1
    shift
    python tools/coordinate_check.py docs/results/experts.yaml --seeds 3 --out "runs/results/experts_$out" "$@" \
        model.hidden_size=128 model.num_attention_heads=8 model.ffn_hidden_size=256 model.moe.ffn_hidden_size=128 \
        completep.base_hidden_size=128 completep.base_expert_ffn_hidden_size=128 optimizer.base_lr=0.001 optimizer.base_init_std=0.02 \
        training.micro_batch_size=16 training.global_batch_size=16 || echo "exit code $?"
}
check number --experts 8,16,32,64 --beside experts_eps
check width --widths 128,256,512 --beside router_lr
check depth --depths 2,4,8,16
