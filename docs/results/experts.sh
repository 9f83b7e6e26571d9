#!/bin/sh
# Mixtures of experts: coordinate checks over width, depth and number of experts, then learning rates. Exit codes 1 and 3 are results too.
set -u
check() {
    out=$1
    shift
    python tools/coordinate_check.py docs/results/experts.yaml --seeds 3 --out "runs/results/experts_$out" \
        model.hidden_size=128 model.num_attention_heads=8 model.ffn_hidden_size=256 model.moe.ffn_hidden_size=128 \
        completep.base_hidden_size=128 completep.base_expert_ffn_hidden_size=128 optimizer.base_lr=0.001 optimizer.base_init_std=0.02 \
        training.micro_batch_size=16 training.global_batch_size=16 "$@" || echo "exit code $?"
}
check number --experts 8,16,32,64 --beside experts_eps
check width --widths 128,256,512 --beside router_lr
check depth --depths 2,4,8,16
# More seeds, since three leave an interval that is wider than its band; a smaller start, since at 0.02 the blocks' random outputs outweigh the embedding.
check width_5_seeds --widths 128,256,512 --seeds 5
check depth_small_start --depths 2,4,8,16 --no-eps optimizer.base_init_std=0.005

python tools/laziness.py docs/results/experts.yaml --depths 2,4,8,16,32,64 --out runs/results/experts_laziness optimizer.base_lr=0.00390625 || echo "exit code $?"

# Learning rates, half octaves; each sweep goes on where it was stopped. The base has 2 of 8 experts.
sweep() {
    out=$1
    shift
    python tools/lr_transfer.py sweep docs/results/experts.yaml --out "runs/results/$out" --workers 1 --seeds 2 "$@"
}
sweep experts --lr=-8.5:-5.5:2
sweep experts --lr=-8.5:-5.5:2 --experts 32
sweep experts --lr=-8.5:-5.5:2 --depths 8
sweep experts --lr=-8.5:-5.5:2 --widths 256
# Controls: SP over width, and 2 of 32, another share, which a configuration refuses without completep.allow_sparsity_change.
sweep experts --lr=-10:-7:2 --widths 256 --parameterizations sp
python tools/lr_transfer.py report runs/results/experts
sweep experts_sparser --lr=-8:-6:2 model.moe.num_experts=32 model.moe.top_k=2 completep.allow_sparsity_change=true
# Balance over 300 steps.
for rate in 0.001 0.01; do
    sweep "experts_balance_$rate" --lr 0.001953125,0.0078125 --train-steps 300 model.moe.bias_rate=$rate
done
for rate in 0.001 0.01 0.03 0.1; do
    sweep "experts_rate_$rate" --lr 0.0078125 --seeds 1 model.moe.bias_rate=$rate
done
sweep experts_balance_none --lr 0.001953125,0.0078125 --train-steps 300 model.moe.balance=none
# Balance by a loss, of both gates; the exponents of the gradients of routers.
for coefficient in 0.001 0.01 0.1; do
    sweep "experts_loss_$coefficient" --lr 0.001953125,0.0078125 --train-steps 300 model.moe.balance=loss model.moe.balance_loss=$coefficient
done
sweep experts_loss_softmax --lr 0.001953125,0.0078125 --train-steps 300 model.moe.gate=softmax model.moe.balance=loss model.moe.balance_loss=0.01
sweep experts_softmax_none --lr 0.001953125,0.0078125 --train-steps 300 model.moe.gate=softmax model.moe.balance=none
python docs/results/experts_router_losses.py docs/results/experts.yaml docs/results/experts/router_losses.json
