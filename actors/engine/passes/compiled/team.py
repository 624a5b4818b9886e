"""Running compiled code in the threads that torch computes with.

torch's own, because a second team of threads in a process takes the cores from the first: GNU's OpenMP then lets no
thread wait actively any more, and every operation ends in a system call.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch


@cache
def _library() -> ctypes.CDLL | None:
    """The OpenMP library that torch brought along, if it has GNU's entry points."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "GOMP_parallel"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def has_team() -> bool:
    """Whether torch's threads can be had."""
    return _library() is not None


def run_in_team(function: int, argument: int, num_threads: int) -> None:
    """Call the C function at an address with an argument, in so many of torch's threads at once."""
    library = _library()
    assert library is not None
    library.GOMP_parallel(function, argument, num_threads, 0)
