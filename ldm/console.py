"""How a script ends: one line and a code for what its user can mend."""

import contextlib
import os
import select
import sys
from collections.abc import Generator


@contextlib.contextmanager
def user_errors() -> Generator[None]:
    """Around a script: what the user can mend becomes one line on stderr and exit code 2 instead of a traceback.

    Those are ValueErrors (ConfigError and DataError among them) and what the file system says (full disk, no rights).
    Ctrl-C is one line too, and exit code 130, as shells have it; a reader of the output that has left (`| head`) is
    no error, and ends the script as it ends others: 141.
    """
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(141) from None
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was complete is kept: a training goes on when started again as before\n")
        raise SystemExit(130) from None


def _nobody_reads() -> bool:
    """Has the reader of the output left? Then what python still flushes at its end goes nowhere."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    gone = bool(pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
