"""`python -m engine.native` compiles the kernels now, so that the first worker needs not."""

from __future__ import annotations

from engine.native.library import NativeUnavailable, load

if __name__ == "__main__":
    try:
        load()
    except NativeUnavailable as error:
        print(f"{error}; workers will compute with torch's operators")
    else:
        print("the native kernels are ready")
