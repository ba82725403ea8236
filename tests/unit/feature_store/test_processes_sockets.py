"""shorten_socket_paths: names the variable when no folder is short enough."""

import tempfile

import pytest

from feature_store.errors import ResourceError
from feature_store.processes import shorten_socket_paths


def test_sockets_are_refused_when_no_folder_has_a_short_name(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 100)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ResourceError, match=r"has 101 bytes in its name, .*; set TMPDIR to a shorter one"):
        shorten_socket_paths()


def test_nothing_changes_when_the_temporary_folder_has_a_short_name(monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    shorten_socket_paths()
