"""Under torchrun: `progress`: kill -9 of one rank after each of the first three saves;
`none`: before the first one, every time.
"""

import os
import signal
import sys

from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error
from megatron_completep.pretrain import pretrain

rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def fail_point(name: str) -> None:
    if sys.argv[2] == "none" and name == "save.folder_created" and rank == 1:
        print("killed before the first save", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if (
        sys.argv[2] == "progress"
        and name == "save.older_ones_removed"
        and rank == 0
        and restarts < 3
    ):
        os.kill(os.getpid(), signal.SIGKILL)


exit_on_user_error(lambda: int(pretrain(load_config(sys.argv[1], []), fail_point)))
