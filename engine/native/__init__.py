"""The decoder for CPUs with AVX-512: kernels in C++ (`kernels.cpp`), compiled on the machine that runs them.

Between torch's operators a decode step of a small model spends a third of its time; a layer here is one call. A row's
result has the same bits whatever chunk, batch or step it is computed in, so it does not matter to a request who else is
served, or on which worker it goes on.
"""
