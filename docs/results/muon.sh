#!/bin/sh
# Muon under the table: the coordinate check. Exit codes 1 and 3 (wrong, cannot tell) are results too.
set -u
python tools/coordinate_check.py docs/results/muon.yaml --depths 2,4,8,16 --widths 64,128,256 --seeds 2 --no-eps --out runs/results/muon_check \
    optimizer.base_lr=0.001953125 optimizer.muon.base_lr=0.0078125 || echo "exit code $?"

# Learning rates: AdamW's base rate in octaves, and Muon's 4 times that; the larger shapes round the proxy's optimum.
sweep() {
    rule=$1
    shift
    python tools/lr_transfer.py sweep docs/results/muon.yaml --out "runs/results/muon_$rule" --workers 1 --seeds 2 "$@"
}
adamw="optimizer.type=adamw optimizer.muon=null"
sweep muon --depths 2 --widths 64 --lr=-10:-5:1
sweep adamw --depths 2 --widths 64 --lr=-9:-5:1 $adamw
sweep muon --depths 2 --widths 256 --lr=-9:-6:1
sweep muon --depths 2 --widths 256 --lr=-10:-7:1 --parameterizations sp
sweep muon --depths 8 --widths 64 --lr=-9:-6:1
sweep adamw --depths 2 --widths 256 --lr=-8:-6:1 $adamw
sweep adamw --depths 8 --widths 64 --lr=-8:-6:1 $adamw
