#!/bin/sh
# Learning-rate transfer over depth, half octaves round each optimum. Stopped, it goes on where it was when it is started again.
set -e
out=runs/results/lr_transfer

sweep() {
    python tools/lr_transfer.py sweep docs/results/lr_transfer.yaml --out "$out" "$@"
}

sweep --weight-decays 0.0 --depths 2 --lr=-8.5:-5:2 --parameterizations completep,alpha_0.5,mup --seeds 6
sweep --weight-decays 0.0 --depths 8 --lr=-8.5:-5.5:2 --parameterizations completep
sweep --weight-decays 0.0 --depths 32 --lr=-8:-5.5:2 --parameterizations completep
sweep --weight-decays 0.0 --depths 8 --lr=-9:-6:2 --parameterizations mup
sweep --weight-decays 0.0 --depths 32 --lr=-9.5:-6:2 --parameterizations mup
sweep --weight-decays 0.0 --depths 8 --lr=-7.5:-5.5:2 --parameterizations alpha_0.5
sweep --weight-decays 0.0 --depths 32 --lr=-7:-4:2 --parameterizations alpha_0.5
sweep --weight-decays 0.1 --depths 2 --lr=-8:-5.5:2 --parameterizations completep,alpha_0.5,mup
sweep --weight-decays 0.1 --depths 8 --lr=-7.5:-6:2
sweep --weight-decays 0.1 --depths 32 --lr=-7.5:-5.5:2
sweep --weight-decays 0.1 --depths 8 --lr=-7:-5:2 --parameterizations alpha_0.5
sweep --weight-decays 0.1 --depths 32 --lr=-7:-4:2 --parameterizations alpha_0.5
sweep --weight-decays 0.1 --depths 8 --lr=-8:-6:2 --parameterizations mup
sweep --weight-decays 0.1 --depths 32 --lr=-8.5:-6:2 --parameterizations mup
python tools/lr_transfer.py report "$out"
