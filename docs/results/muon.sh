#!/bin/sh
# Muon under the table: the coordinate check, and its learning rates beside AdamW's. Exit codes 1 and 3 (wrong, cannot tell) are results too.
set -u
python tools/coordinate_check.py docs/results/muon.yaml --depths 2,4,8,16 --widths 64,128,256 --seeds 3 --no-eps --out runs/results/muon_check \
    optimizer.base_lr=0.001953125 optimizer.muon.base_lr=0.0078125 || echo "exit code $?"

# AdamW's base rate in octaves; Muon's is 4 times that. sp: Moonlight's factor, the control. Stopped, a sweep goes on where it was.
sweep() {
    rule=$1
    shift
    python tools/lr_transfer.py sweep docs/results/muon.yaml --out "runs/results/muon_$rule" --workers 1 --seeds 2 --train-steps 64 "$@"
}
adamw="optimizer.type=adamw optimizer.muon=null"
sweep muon --widths 64 --lr=-9:-6:1
sweep adamw --widths 64 --lr=-8:-5:1 $adamw
sweep muon --widths 128 --lr=-9:-6:1
sweep muon --widths 128 --lr=-10:-7:1 --parameterizations sp
sweep adamw --widths 128 --lr=-8:-5:1 $adamw
sweep muon --depths 8 --widths 64 --lr=-9:-7:1
sweep adamw --depths 8 --widths 64 --lr=-8:-6:1 $adamw
# At equal tau, 0.5 at these rates, and AdamW at the time that Muon takes.
sweep muon --widths 64 --lr=-8:-7:1 --weight-decays 6.0
sweep adamw --widths 64 --lr=-7:-6:1 --weight-decays 3.0 $adamw
# Once more over depth, with a smaller start: with that of the transfer the blocks' random outputs outweigh the embedding.
python tools/coordinate_check.py docs/results/muon.yaml --depths 2,4,8,16,32 --seeds 3 --no-eps --out runs/results/muon_check_small_start \
    optimizer.base_lr=0.001953125 optimizer.muon.base_lr=0.0078125 optimizer.base_init_std=0.02 || echo "exit code $?"
# Muon's best rates lay at the edge of the grids above.
sweep muon --widths 64 --lr=-5:-3:1
sweep muon --widths 128 --lr=-5:-3:1
sweep muon --widths 128 --lr=-6:-4:1 --parameterizations sp
sweep muon --depths 8 --widths 64 --lr=-6:-4:1
