"""Preload of a shielded fork server: unblocks its signals in others' workers."""

import signal
from multiprocessing import current_process, util

from feature_store.processes import SHIELDED, ShieldedProcess


def _unblock(_: object) -> None:
    """Give a worker that the fork server forked for somebody else the signals that ``Process.terminate`` sends."""
    if not isinstance(current_process(), ShieldedProcess):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)


if signal.pthread_sigmask(signal.SIG_BLOCK, []) >= SHIELDED:  # only in such a fork server
    util.register_after_fork(_unblock, _unblock)
