"""Preload of a shielded fork server: unblocks its signals in others' workers."""

import signal
from multiprocessing import current_process, util

from feature_store.processes import SHIELDED, ShieldedProcess


def _unblock(_: object) -> None:
    """Unblock the signals that ``Process.terminate`` sends in a worker of another context."""
    if not isinstance(current_process(), ShieldedProcess):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)


if signal.pthread_sigmask(signal.SIG_BLOCK, []) >= SHIELDED:  # only in such a fork server
    util.register_after_fork(_unblock, _unblock)
