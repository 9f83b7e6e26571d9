#!/bin/sh
# Deep and narrow against shallow and wide: three shapes of equal FLOPs, each to two lengths, at the learning rate of the proxy (2^-7).
set -e
out=runs/results/shapes

sweep() {
    python tools/lr_transfer.py sweep docs/results/lr_transfer.yaml --out "$out" --lr 0.0078125 --parameterizations completep,mup "$@"
}

sweep --depths 2 --widths 128 --train-steps 128,256
sweep --depths 8 --widths 64 --train-steps 128,256
sweep --depths 16 --widths 48 --train-steps 112,224
python tools/lr_transfer.py report "$out"
