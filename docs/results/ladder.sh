#!/bin/sh
# The ladder on the source of Python's standard library, with muP as the control. Stopped, it goes on where it was when it is started again.
# The text: every .py file below the standard library's folder but site-packages, one JSON line {"text": ...} a file, in order of the path.
set -e
out=runs/ladder/results

python tools/preprocess_data.py --input stdlib.jsonl --output-prefix runs/ladder/corpus --append-eod --tokenizer-type bytes --overwrite
python tools/ladder.py plan docs/results/ladder_3x24.yaml --out "$out" --rungs 5 --to-flops 7e12 --tokens-per-parameter 12 \
    --seeds 4,4,3,2,1 --target-flops 2.5e13 --parameterizations completep,mup
python tools/ladder.py run "$out"
python tools/ladder.py fit "$out"
