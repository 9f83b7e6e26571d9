#!/bin/sh
# Muon under the table: the coordinate check. Exit codes 1 and 3 (wrong, cannot tell) are results too.
set -u
python tools/coordinate_check.py docs/results/muon.yaml --depths 2,4,8,16 --widths 64,128,256 --seeds 3 --no-eps --out runs/results/muon_check \
    optimizer.base_lr=0.001953125 optimizer.muon.base_lr=0.0078125 || echo "exit code $?"
