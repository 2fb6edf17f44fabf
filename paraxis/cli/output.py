"""Standard output for people, who may stop reading before we stop writing."""

import os
import sys


def show(text: str, end: str = "\n") -> bool:
    """Prints `text` at once. False where nobody reads any more, as behind `| head`: no error, but no use in going on."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails to flush it at its end
        return False
    return True
