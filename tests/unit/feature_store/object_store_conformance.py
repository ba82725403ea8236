"""What every ObjectStore must do; subclasses give a fixture ``objects``: an empty, writable one."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

CONTENT = bytes(range(256)) * 40


class ObjectStoreConformance:
    def test_get_returns_what_was_put(self, objects):
        objects.put("a/c/0", CONTENT)
        objects.put("empty", b"")
        objects.sync(["a/c/0", "empty"])
        assert objects.get("a/c/0").tobytes() == CONTENT
        assert objects.get("empty").tobytes() == b""
        assert objects.size("a/c/0") == len(CONTENT)

    def test_put_joins_buffers_of_any_kind(self, objects):
        objects.put("a/c/0", [b"ab", memoryview(b""), np.arange(3, dtype="<u2"), memoryview(b"cd")])
        assert objects.get("a/c/0").tobytes() == b"ab\0\0\1\0\2\0cd"

    def test_put_takes_more_buffers_than_one_system_call(self, objects):
        objects.put("a/c/0", [bytes([at % 251]) for at in range(5000)])
        assert objects.get("a/c/0").tobytes() == bytes(at % 251 for at in range(5000))

    def test_put_takes_bytes_as_they_are_made_and_leaves_nothing_when_they_cannot_be(self, objects):
        def parts(*, fails):
            yield CONTENT
            if fails:
                raise ZeroDivisionError
            yield CONTENT

        objects.put("a/c/0", parts(fails=False))
        with pytest.raises(ZeroDivisionError):
            objects.put("a/c/1", parts(fails=True))
        assert objects.get("a/c/0").tobytes() == 2 * CONTENT
        assert objects.list() == ["a/c/0"]

    def test_put_replaces_whole_objects(self, objects):
        objects.put("a/c/0", CONTENT)
        objects.put("a/c/0", b"short")
        assert objects.get("a/c/0").tobytes() == b"short"
        assert objects.list() == ["a/c/0"]

    def test_put_new_keeps_the_first_when_there_is_one(self, objects):
        objects.put("r/1", b"first", new=True)
        with pytest.raises(FileExistsError):
            objects.put("r/1", b"second", new=True)
        assert objects.get("r/1").tobytes() == b"first"
        assert objects.list() == ["r/1"]

    def test_put_new_lets_exactly_one_win_when_many_try_at_once(self, objects):
        def attempt(content: bytes) -> bytes | None:
            try:
                objects.put("r/1", content, new=True)
            except FileExistsError:
                return None
            return content

        with ThreadPoolExecutor(8) as pool:
            winners = [won for won in pool.map(attempt, [b"%d" % at for at in range(8)]) if won is not None]
        assert [objects.get("r/1").tobytes()] == winners

    def test_get_range_is_shorter_where_the_object_ends(self, objects):
        objects.put("a/c/0", CONTENT)
        assert objects.get_range("a/c/0", 3, 5).tobytes() == CONTENT[3:8]
        assert objects.get_range("a/c/0", len(CONTENT) - 2, 5).tobytes() == CONTENT[-2:]
        assert objects.get_range("a/c/0", len(CONTENT) + 9, 5).tobytes() == b""

    def test_read_into_fills_parts_and_skips_between(self, objects):
        objects.put("a/c/0", CONTENT)
        one, two = bytearray(300), bytearray(7)
        objects.read_into("a/c/0", 5, [memoryview(one), 1000, memoryview(two)])
        assert bytes(one) == CONTENT[5:305]
        assert bytes(two) == CONTENT[1305:1312]

    def test_read_into_without_waiting_fills_all_or_says_no(self, objects):
        objects.put("a/c/0", CONTENT)
        target = bytearray(300)
        if objects.read_into("a/c/0", 5, [memoryview(target)], wait=False):
            assert bytes(target) == CONTENT[5:305]
        assert not objects.read_into("a/c/0", len(CONTENT) - 3, [memoryview(bytearray(4))], wait=False)

    def test_opened_file_holds_the_object_where_there_are_files(self, objects):
        objects.put("a/c/0", CONTENT)
        assert objects.opened("a/c/0") is None
        assert objects.opened("a/c/1") is None
        objects.get_range("a/c/0", 0, 1)
        if (file := objects.opened("a/c/0")) is not None:
            assert os.pread(file.descriptor, 300, 5) == CONTENT[5:305]

    def test_read_into_takes_more_parts_than_one_system_call(self, objects):
        objects.put("a/c/0", CONTENT)
        parts = [bytearray(1) for _ in range(3000)]
        objects.read_into("a/c/0", 0, [piece for part in parts for piece in (memoryview(part), 1)])
        assert b"".join(parts) == CONTENT[:6000:2]

    def test_read_into_raises_when_the_object_ends_before(self, objects):
        objects.put("a/c/0", CONTENT)
        with pytest.raises(EOFError, match=f"ends at byte {len(CONTENT)}"):
            objects.read_into("a/c/0", len(CONTENT) - 3, [memoryview(bytearray(4))])

    def test_missing_objects_are_file_not_found(self, objects):
        objects.put("a/c/0", CONTENT)
        for path in ("b", "a/c/1", "a/c/0/d"):
            with pytest.raises(FileNotFoundError):
                objects.get(path)
            with pytest.raises(FileNotFoundError):
                objects.read_into(path, 0, [memoryview(bytearray(1))])
            with pytest.raises(FileNotFoundError):
                objects.size(path)
            with pytest.raises(FileNotFoundError):
                objects.delete(path)

    def test_list_and_sizes_give_paths_with_the_prefix(self, objects):
        for path in ("zarr.json", "a/zarr.json", "a/c/0", "a/c/10", "ab/c/0"):
            objects.put(path, path.encode())
        assert objects.lists
        assert objects.list() == ["a/c/0", "a/c/10", "a/zarr.json", "ab/c/0", "zarr.json"]
        assert objects.list("a/") == ["a/c/0", "a/c/10", "a/zarr.json"]
        assert objects.list("a/c/1") == ["a/c/10"]
        assert objects.list("nothing/") == []
        assert objects.sizes("a/c/") == {"a/c/0": 5, "a/c/10": 6}

    def test_delete_removes_one_object(self, objects):
        objects.put("a/c/0", CONTENT)
        objects.put("a/c/1", CONTENT)
        objects.get("a/c/0")
        objects.delete("a/c/0")
        assert objects.list() == ["a/c/1"]
        with pytest.raises(FileNotFoundError):
            objects.get("a/c/0")

    def test_forget_lets_go_of_an_object_that_was_replaced(self, objects):
        objects.put("a/c/0", CONTENT)
        objects.get_range("a/c/0", 0, 1)
        objects.put("a/c/0", CONTENT[::-1])
        assert objects.forget("a/c/0") is None
        assert objects.opened("a/c/0") is None
        assert objects.get_range("a/c/0", 0, 9).tobytes() == CONTENT[::-1][:9]
        assert objects.forget("never/c/0") is None

    def test_a_pickled_one_reads_the_same(self, objects):
        objects.put("a/c/0", CONTENT)
        objects.get("a/c/0")
        copy = pickle.loads(pickle.dumps(objects))  # noqa: S301 - our own object
        assert copy.get("a/c/0").tobytes() == CONTENT
        assert copy.url == objects.url
