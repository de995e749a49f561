# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM, where their ordinary way would do harm."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Lets signals take effect at the end of the block."""
    arrived: list[int] = []
    handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other one is interrupted
            for number in _SIGNALS:
                if signal.getsignal(number) is not None:  # one that was not set from Python cannot be set again
                    handlers[number] = signal.signal(number, lambda received, _: arrived.append(received))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in arrived:
            signal.raise_signal(received)


@contextmanager
def termination_unwinds() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit` with the exit code that shells know, unless the process handles it already.

    By default it ends Python at once, and what is half written stays.
    """
    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_elsewhere() -> Iterator[None]:
    """Lets another thread receive signals; they interrupt what the block computes as ever.

    OpenVINO's CPU plugin gives the thread that loads it a stack for signals, and does not always take it back before
    it frees it: where several `openvino.Core`s come and go, a signal to that thread is a segmentation fault.
    """
    libc = ctypes.CDLL(None)
    stack = (ctypes.c_size_t * 3)()  # a stack_t
    libc.sigaltstack(None, stack)
    end = threading.Event()
    threading.Thread(target=end.wait, daemon=True).start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        libc.sigaltstack(stack, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        end.set()
