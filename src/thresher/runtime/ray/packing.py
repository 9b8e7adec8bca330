"""Values and errors on their way between processes: pickles whose arrays stay apart."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

Packed = tuple[bytes, list[Any]]  # a pickle, and the memory of its arrays as (bytes,) uint8 each


def pack(value: Any) -> Packed:
    """Pickle a value; the memory of its arrays stays apart, so that it is copied only once, to shared memory."""
    import numpy as np
    from ray import cloudpickle

    buffers: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return data, [np.asarray(one.raw()) for one in buffers]  # Ray's client cannot send a memoryview


def unpack(packed: Packed, *, shared: bool = False) -> Any:
    """Return a value that the other side packed; its arrays are copies that can be changed unless ``shared``."""
    data, buffers = packed
    return pickle.loads(data, buffers=buffers if shared else [bytearray(one) for one in buffers])


def size_of(packed: Packed) -> int:
    """Return the number of bytes."""
    return len(packed[0]) + sum(map(len, packed[1]))


def portable(error: BaseException) -> Callable[[], BaseException]:
    """Return a picklable function that returns an error, with its traceback as a note."""
    from ray import cloudpickle

    error.add_note(f"in a worker of Ray:\n{''.join(traceback.format_exception(error)).rstrip()}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    ways = partial(_itself, error), partial(_made_again, type(error), error.args, vars(error))
    for way in ways:  # the second, if its class takes other arguments than those that it passes on
        with suppress(Exception):
            pickle.loads(cloudpickle.dumps(way))()
            return way
    return partial(RuntimeError, f"{type(error).__name__}: {error}")


def _itself(error: BaseException) -> BaseException:
    return error


def _made_again(cls: type[BaseException], args: tuple[Any, ...], values: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    vars(error).update(values)
    return error
