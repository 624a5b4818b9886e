"""How kernels are compiled: by numba, to code that needs neither torch nor the interpreter's lock."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS = {
    "nogil": True,
    # Division by zero gives inf or nan, as in numpy: the check for it would keep loops from being vectorised.
    "error_model": "numpy",
    # a * b + c may become one fused operation where the processor has it, as in torch's add_. No other licence of fast
    # mathematics is taken: -inf and nan are values here.
    "fastmath": {"contract"},
}

logger = logging.getLogger(__name__)


def compiled(function: Function) -> Function:
    """Return `function` compiled at its first call, from numba's cache on disk where there is one.

    The cache lies in `__pycache__` beside the source, else in the user's cache directory; where neither can be
    written, every process compiles for itself. It knows of changes in the function's own file only, so kernels that
    call one another live in one file.
    """
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError as error:
        logger.debug("%s is compiled in every process: %s", function.__name__, error)
        return numba.njit(**OPTIONS)(function)
