#!/bin/sh
# Do float8 scales of the proxy hold at wider and deeper models? Exit codes 1 and 3 (no, cannot tell) are results too.
set -u
python tools/coordinate_check.py docs/results/lr_transfer.yaml --widths 64,128,256,512 --depths 2,4,8,16 --float8 --steps 128 --seeds 3 --out runs/results/float8 \
    training.cpu_threads=1 || echo "exit code $?"
