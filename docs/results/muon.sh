#!/bin/sh
# Muon under the table: the coordinate check, laziness, and its learning rates beside AdamW's. Exit codes 1 and 3 (wrong, cannot tell) are results too.
set -u
rates="optimizer.base_lr=0.001953125 optimizer.muon.base_lr=0.0078125"
check() {
    out=$1
    shift
    python tools/coordinate_check.py docs/results/muon.yaml --seeds 3 --no-eps --out "runs/results/muon_check_$out" $rates "$@" ||
        echo "exit code $?"
}
mistakes="--beside muon_adam_width,muon_adam_rms"
check width --widths 64,128,256,512 $mistakes training.micro_batch_size=32 training.global_batch_size=32
# More iterations: five lift small singular values in part.
check width_12 --widths 64,128,256,512 $mistakes optimizer.muon.iterations=12
check depth --depths 2,4,8,16
# Once more over depth, with a smaller start: with that of the transfer the blocks' random outputs outweigh the embedding.
check small_start --depths 2,4,8,16,32 optimizer.base_init_std=0.02
python tools/laziness.py docs/results/muon.yaml --seeds 3 --out runs/results/muon_laziness training.precision=float64 \
    optimizer.base_lr=0.00390625 optimizer.muon.base_lr=0.015625

# AdamW's base rate in octaves; Muon's is 4 times that. Stopped, a sweep goes on where it was.
sweep() {
    out=$1
    shift
    python tools/lr_transfer.py sweep docs/results/muon.yaml --out "runs/results/$out" --workers 1 --seeds 4 "$@"
}
adamw="optimizer.type=adamw optimizer.muon=null"
sweep muon --train-steps 128 --widths 64 --lr=-7.5:-5:2
sweep muon --train-steps 128 --widths 128 --lr=-7.5:-5.5:2
sweep muon --train-steps 128 --depths 8 --widths 64 --lr=-7.5:-5:2
sweep muon --train-steps 128 --widths 128 --lr=-8.5:-6.5:2 --parameterizations sp
sweep adamw --train-steps 128 --widths 64,128 --lr=-8:-6:2 $adamw
sweep adamw --train-steps 128 --depths 8 --widths 64 --lr=-8:-6:2 $adamw
# AdamW at the time that Muon takes.
sweep adamw_longer --train-steps 156 --widths 64 --lr=-7.5:-6.5:2 $adamw
sweep adamw_longer --train-steps 189 --widths 128 --lr=-7.5:-6.5:2 $adamw
# At equal tau.
sweep muon_tau --train-steps 128 --widths 64 --lr=-6.5:-5.5:2 --weight-decays 1.0
sweep adamw_tau --train-steps 128 --widths 64 --lr=-7.5:-6.5:2 --weight-decays 2.0 $adamw
# Other ratios of the two rates.
sweep muon_ratio_2 --train-steps 128 --widths 64 --lr=-7:-5.5:2 optimizer.muon.base_lr=0.015625
sweep muon_ratio_8 --train-steps 128 --widths 64 --lr=-7:-5.5:2 optimizer.muon.base_lr=0.0625
for out in muon adamw adamw_longer muon_tau adamw_tau muon_ratio_2 muon_ratio_8; do
    python tools/lr_transfer.py report "runs/results/$out"
done
