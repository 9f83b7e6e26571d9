#!/bin/sh
# Learning-rate transfer over depth: half octaves round each optimum, decay 0 and 0.1. Stopped, it goes on where it was when started again.
set -e
out=runs/results/lr_transfer

sweep() {
    decay=$1
    shift
    python tools/lr_transfer.py sweep docs/results/lr_transfer.yaml --out "$out" --weight-decays "$decay" "$@"
}

for decay in 0.0 0.1; do
    sweep $decay --depths 2 --lr=-9:-5.5:2 --parameterizations completep,alpha_0.5,mup --seeds 6
    sweep $decay --depths 8 --lr=-9:-6:2 --parameterizations completep
    sweep $decay --depths 8 --lr=-10:-7:2 --parameterizations mup
    sweep $decay --depths 8 --lr=-8:-5.5:2 --parameterizations alpha_0.5
    sweep $decay --depths 32 --lr=-8.5:-6.5:2 --parameterizations completep
    sweep $decay --depths 32 --lr=-10.5:-7.5:2 --parameterizations mup
    sweep $decay --depths 32 --lr=-8:-5.5:2 --parameterizations alpha_0.5
done
python tools/lr_transfer.py report "$out"
