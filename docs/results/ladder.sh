#!/bin/sh
# The ladder on the source of Python's standard library, with muP as the control. Stopped, it goes on where it was when it is started again.
# The text: every .py file below the standard library's folder but site-packages, one JSON line {"text": ...} a file, in order of the path.
set -e
proxy=docs/results/ladder_3x48.yaml
out=runs/ladder/results

python tools/preprocess_data.py --input stdlib.jsonl --output-prefix runs/ladder/corpus --append-eod --tokenizer-type bytes --overwrite
# The best learning rate of the proxy, and how it falls with the length: 30 minutes of two cores.
python tools/lr_transfer.py sweep "$proxy" --out runs/ladder/horizon --lr=-9:-6:1 --train-steps 1055,2110,4220 --seeds 2
python tools/lr_transfer.py report runs/ladder/horizon
# Four hours of two cores.
python tools/ladder.py plan "$proxy" --out "$out" --rungs 5 --to-flops 4e13 --tokens-per-parameter 5 --batch-power 0 \
    --duration-exponent 0.41 --seeds 8,8,8,8,3 --target-flops 2e14 --parameterizations completep,mup
python tools/ladder.py run "$out"
python tools/ladder.py fit "$out"
