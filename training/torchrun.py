"""torchrun, ending as its ranks did: `python -m training.torchrun ...` takes torchrun's arguments.

torchrun itself ends with 1 whatever befell the ranks, also where all of them were asked to stop and saved their state.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from runtime import exits

SAVE_SECONDS = 110  # that ranks have to finish their step and save, else they are killed; orchestration waits 120


def main() -> None:
    try:
        run(parse_args(["--shutdown-timeout", str(SAVE_SECONDS), *sys.argv[1:]]))
    except SignalException:
        sys.exit(exits.INTERRUPTED)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != exits.INTERRUPTED:
            print(error, file=sys.stderr, flush=True)
        sys.exit(max(failure.exitcode, exits.FAILED))  # one that a signal ended has a negative code


if __name__ == "__main__":
    main()
