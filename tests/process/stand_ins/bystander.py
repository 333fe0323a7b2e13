"""Says hello; `python -m bystander CODE` then ends with that code, without one it waits to be stopped."""

import signal
import sys

print("hello", flush=True)
if len(sys.argv) > 1:
    sys.exit(int(sys.argv[1]))
signal.pause()
