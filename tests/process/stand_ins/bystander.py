"""Says hello; `python -m bystander CODE` then ends with that code, without one it waits to be stopped."""

import signal
import sys

print("hello", flush=True)
codes = [word for word in sys.argv[1:] if word.isdecimal()]  # a place may add arguments of its own
if codes:
    sys.exit(int(codes[0]))
signal.pause()
