"""Leases of units: one holder each, taken over from the dead, on a disk and in a bucket."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from servers import FlakyProxy, s3_server

from feature_store.backends.bucket import RemoteObjects
from feature_store.backends.local import LocalObjects
from teacher_service.share.leases import BucketLeases, Leases, open_leases

CONTEXT = multiprocessing.get_context("spawn")
LEASE_SECONDS = 60.0


@pytest.fixture(scope="module")
def new_bucket() -> Iterator[Callable[[], str]]:
    with s3_server() as make:
        yield make


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class LeasesConformance:
    """What every kind of leases does; subclasses give a fixture ``make``: leases of one store, of a new holder."""

    def test_a_unit_has_one_holder_until_it_is_released(self, make: Callable[[], Leases]) -> None:
        with make() as first, make() as second:
            assert first.take(3)
            assert not second.take(3)
            assert not first.take(3)
            assert second.take(4)
            assert (first.held(), second.held()) == ({3}, {4})
            first.release(3)
            assert first.held() == frozenset()
            assert second.take(3)
            assert not first.take(3)

    def test_release_does_nothing_when_another_holds_the_unit(self, make: Callable[[], Leases]) -> None:
        with make() as first, make() as second:
            assert first.take(3)
            second.release(3)
            second.release(4)
            assert not second.take(3)

    def test_leaving_the_context_releases_every_unit_when_work_fails(self, make: Callable[[], Leases]) -> None:
        def fail() -> None:
            with make() as first:
                assert first.take(1)
                assert first.take(2)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        with make() as second:
            assert second.take(1)
            assert second.take(2)

    def test_nothing_is_left_in_the_store_when_all_are_released(self, make: Callable[[], Leases], objects) -> None:
        with make() as leases:
            assert leases.take(1)
            leases.release(1)
            assert leases.take(2)
        assert objects.list() == []

    def test_leases_are_no_part_of_the_data(self, make: Callable[[], Leases], objects) -> None:
        with make() as leases:
            assert leases.take(1)
            assert all(path.startswith(".locks/lease-") for path in objects.list())


class TestFileLeases(LeasesConformance):
    @pytest.fixture
    def objects(self, tmp_path: Path) -> LocalObjects:
        return LocalObjects(tmp_path)

    @pytest.fixture
    def make(self, objects: LocalObjects) -> Callable[[], Leases]:
        return lambda: open_leases(objects, LEASE_SECONDS)

    def test_a_unit_is_free_at_once_when_its_holder_is_killed(self, make, objects: LocalObjects) -> None:
        holder = hold_in_process(objects.url, LEASE_SECONDS)
        with make() as leases:
            assert not leases.take(7)
            kill(holder)
            assert leases.take(7)

    def test_units_are_leased_among_processes_of_one_machine_when_the_file_system_has_no_locks(
        self, make, objects: LocalObjects, tmp_path_factory, monkeypatch
    ) -> None:
        flock, temporary = fcntl.flock, tmp_path_factory.mktemp("machine")

        def refused(file: IO[str], operation: int) -> None:
            if not Path(f"/proc/self/fd/{file.fileno()}").readlink().is_relative_to(temporary):
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            flock(file, operation)

        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        monkeypatch.setattr(fcntl, "flock", refused)
        with make() as first, make() as second:
            assert first.take(3)
            assert not second.take(3)
            first.release(3)
            assert second.take(3)

    def test_sweep_removes_what_a_killed_holder_left_and_no_held_lease(self, make, objects: LocalObjects) -> None:
        kill(hold_in_process(objects.url, LEASE_SECONDS))
        assert objects.list() == [".locks/lease-u00007"]
        with make() as leases, make() as other:
            assert other.take(8)
            leases.sweep()
            assert objects.list() == [".locks/lease-u00008"]
            assert not leases.take(8)


class TestBucketLeases(LeasesConformance):
    @pytest.fixture
    def objects(self, new_bucket: Callable[[], str]) -> RemoteObjects:
        return RemoteObjects(new_bucket() + "/some/store")

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def make(self, objects: RemoteObjects, clock: Clock) -> Callable[[], BucketLeases]:
        """Leases whose heartbeats come when a test calls ``renew``: the real thread's first is after 15 s."""
        return lambda: BucketLeases(objects, LEASE_SECONDS, clock)

    def test_a_unit_is_taken_over_when_one_observer_saw_no_heartbeat_for_the_lease_time(self, make, clock) -> None:
        dead, observer, late = make(), make(), make()
        assert dead.take(3)
        assert not observer.take(3)
        clock.now += LEASE_SECONDS - 1
        assert not observer.take(3)
        clock.now += 1
        assert not late.take(3)  # it has seen the lease for no time yet
        assert observer.take(3)
        assert observer.held() == {3}

    def test_a_unit_is_kept_when_its_holder_renews_in_time(self, make, clock) -> None:
        holder, observer = make(), make()
        assert holder.take(3)
        for _ in range(5):
            assert not observer.take(3)
            clock.now += LEASE_SECONDS - 1
            holder.renew()
        assert not observer.take(3)
        assert holder.held() == {3}

    def test_one_observer_wins_when_two_take_over_at_once(self, make, clock) -> None:
        dead, first, second = make(), make(), make()
        assert dead.take(3)
        assert not first.take(3)
        assert not second.take(3)
        clock.now += LEASE_SECONDS
        assert first.take(3)
        assert not second.take(3)

    def test_a_holder_that_comes_back_loses_the_lease_and_leaves_the_new_one(self, make, clock, caplog) -> None:
        suspended, observer, third = make(), make(), make()
        assert suspended.take(3)
        assert suspended.take(4)
        assert not observer.take(3)
        clock.now += LEASE_SECONDS
        assert observer.take(3)

        suspended.renew()

        assert suspended.held() == {4}
        assert "the lease of u00003 was taken over" in caplog.text
        suspended.release(3)
        assert not third.take(3)
        observer.renew()
        assert observer.held() == {3}

    def test_release_leaves_the_new_lease_when_the_unit_was_taken_over_unnoticed(self, make, clock) -> None:
        suspended, observer, third = make(), make(), make()
        assert suspended.take(3)
        assert not observer.take(3)
        clock.now += LEASE_SECONDS
        assert observer.take(3)
        suspended.release(3)
        assert not third.take(3)

    def test_the_lease_time_is_its_holders_when_observers_have_another(self, objects, make, clock) -> None:
        assert BucketLeases(objects, 10 * LEASE_SECONDS, clock).take(3)
        observer = make()
        assert not observer.take(3)
        clock.now += 10 * LEASE_SECONDS - 1
        assert not observer.take(3)
        clock.now += 1
        assert observer.take(3)

    @pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"lease_seconds": "soon"}', b'{"lease_seconds": null}'])
    def test_a_damaged_lease_expires_like_another(self, objects, make, clock, content: bytes) -> None:
        objects.put(".locks/lease-u00003", content)
        observer = make()
        assert not observer.take(3)
        clock.now += LEASE_SECONDS
        assert observer.take(3)

    def test_leases_work_when_the_bucket_fails_every_third_request(self, objects, clock, monkeypatch) -> None:
        """A put whose response is lost is sent again and refused, although the first one counted."""
        with FlakyProxy(os.environ["AWS_ENDPOINT_URL"], every=3) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            flaky = RemoteObjects(objects.url)
            leases = BucketLeases(flaky, LEASE_SECONDS, clock)
            for unit in range(6):
                assert leases.take(unit)
            for _ in range(3):
                leases.renew()
            assert leases.held() == set(range(6))
            for unit in range(6):
                leases.release(unit)
            assert flaky.list() == []
        assert proxy.failed > 6

    def test_heartbeats_keep_a_unit_while_its_process_lives(self, objects) -> None:
        with BucketLeases(objects, 0.4) as holder:
            assert holder.take(3)
            before = json.loads(objects.get_version(".locks/lease-u00003")[0])
            while (now := json.loads(objects.get_version(".locks/lease-u00003")[0])) == before:
                time.sleep(0.01)
            assert now["holder"] == before["holder"]
            assert holder.held() == {3}

    def test_a_killed_processs_unit_is_taken_over_within_its_lease_time(self, objects) -> None:
        holder = hold_in_process(objects.url, 2.0)
        with BucketLeases(objects, 2.0) as leases:
            for _ in range(8):  # its heartbeats hold the unit for longer than the lease time
                assert not leases.take(7)
                time.sleep(0.4)
            kill(holder)
            started = time.monotonic()
            while not leases.take(7):
                time.sleep(0.05)
            assert time.monotonic() - started < 10


def hold_in_process(url: str, lease_seconds: float) -> multiprocessing.process.BaseProcess:
    """A process that holds unit 7, with heartbeats."""
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(url, lease_seconds, ready))
    process.start()
    assert ready.wait(60)
    return process


def _hold(url: str, lease_seconds: float, ready) -> None:
    from feature_store.backends.open import open_objects

    with open_leases(open_objects(url), lease_seconds) as leases:
        assert leases.take(7)
        ready.set()
        signal.pause()


def kill(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()
    process.join()
