"""`python -m bench.handoff.bare_process FD`: one end of a bare transfer, until its parent closes the connection FD.

Memory is touched beforehand and descriptors are prepared as far as the engine can: only the bytes' way is timed.
"""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

from bench.handoff.bare import Count, Start
from bench.handoff.engines import Pool, Remote, open_engine

PROGRESS_SECONDS = 1e-3
"""Between two looks at an engine that may be written to."""


def main() -> None:
    link = Connection(int(sys.argv[1]))
    start: Start = link.recv()
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    # In huge pages where there are any: numpy asks for them, as the workers' pools do.
    memory = np.full((start.pages, start.page_bytes), start.fill, dtype=np.uint8)
    pool = Pool(memory.ctypes.data, start.pages, start.page_bytes)
    engine = open_engine(start.transfer, f"bare-{os.getpid()}", pool)
    link.send(Remote(engine.endpoint, pool))
    while True:
        if not link.poll(PROGRESS_SECONDS):
            engine.progress()
            continue
        try:
            asked = link.recv()
        except EOFError:
            return
        if isinstance(asked, Remote):
            engine.connect(asked)
            link.send(None)
        elif isinstance(asked, Count):
            link.send(int((memory[list(asked.pages)] == asked.fill).all(axis=1).sum()))
        else:
            begun = time.perf_counter()
            engine.write(asked.sources, asked.targets)
            link.send(time.perf_counter() - begun)


if __name__ == "__main__":
    main()
