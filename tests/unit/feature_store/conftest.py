"""Tests do not wait for the disk: a killed process loses nothing without fsync, only a power cut does.

That every object, directory and record is synced, and when, is what test_durability.py is about.
"""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
