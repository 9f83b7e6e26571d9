#!/bin/sh
# Depth coordinate checks at width 256. Exit codes 1 and 3 (wrong, cannot tell) are results too.
set -u
check() {
    out=$1
    shift
    python tools/coordinate_check.py docs/results/coordinate_check.yaml --depths 2,4,8,16,32,64 --no-eps --workers 2 --out "runs/results/$out" "$@" ||
        echo "exit code $?"
}
decoder="model.activation=squared_relu model.position=alibi model.bias=true"
tokens_1024="model.seq_length=64 training.micro_batch_size=8 training.global_batch_size=16"
tokens_256="model.seq_length=64 training.micro_batch_size=4 training.global_batch_size=4"

# The published setting.
check coordinate_check --seeds 3 --beside alpha_0.5
# The paper's decoder (squared ReLU, ALiBi, biases), and what bends a right model's curve: few tokens, large steps.
check coordinate_check_decoder --seeds 1 $decoder
check coordinate_check_1024 --seeds 3 $tokens_1024
check coordinate_check_256 --seeds 3 $tokens_256
check coordinate_check_decoder_1024 --seeds 2 $decoder $tokens_1024
check coordinate_check_decoder_1024_large_steps --seeds 2 $decoder $tokens_1024 optimizer.base_lr=0.001953125
# Half the width, with the runs that show a wrong eps.
python tools/coordinate_check.py docs/results/coordinate_check.yaml --depths 2,4,8,16,32,64 --seeds 2 --workers 2 --out runs/results/coordinate_check_width_128 \
    $decoder model.hidden_size=128 model.ffn_hidden_size=512 completep.base_hidden_size=128 optimizer.base_lr=0.001953125 \
    model.seq_length=64 training.micro_batch_size=8 training.global_batch_size=8 || echo "exit code $?"
