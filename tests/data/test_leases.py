"""Commands that work in one folder leave each other alone, and take over what a dead one has left."""

import json
import os
import subprocess
import threading
import time
from collections import Counter

import pytest

from rayclip.data.leases import Leases, holders_in
from rayclip.progress import listening
from rayclip.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "out"))


def someone(store, **changes):
    """Leave the file of a command of another host, as it was at its last sign of life; its clock is no matter."""
    said = {"host": "far", "machine": "far 1", "pid": 1, "beat": 7, "holds": ["a", "b"], **changes}
    store.write(".lease-000000000000.json", json.dumps(said).encode())
    os.utime(store.path(".lease-000000000000.json"), (0, 2**33))  # ten decades off


def test_of_two_each_name_goes_to_one_and_nothing_is_left_behind(store):
    with Leases(store) as mine, Leases(store) as other:
        assert mine.claim("ab") == {"a", "b"}
        assert other.claim("bc") == {"c"}
        assert other.claim("bc") == {"c"}, "again"
        mine.release("b")
        assert other.claim("b") == {"b"}
        assert len(holders_in(store)) == 2
    assert list(store.path("").iterdir()) == []


@pytest.mark.ci
def test_an_object_store_is_enough(s3):
    store = Store(s3).child("leased")
    with Leases(store) as mine, Leases(store) as other:
        assert mine.claim("ab") == {"a", "b"} and other.claim("abc") == {"c"}
        assert len(holders_in(store)) == 2
        mine.release("a")
        other.wait("ab", "evaluating")
        assert other.claim("ab") == {"a"}
    assert store.names("", ".json") == [] == holders_in(store)


def test_of_many_at_once_never_two_hold_a_name(store):
    held, most, lock = Counter[str](), Counter[str](), threading.Lock()

    def work():
        for _ in range(5):
            with Leases(store, beat_s=0.02) as leases:
                for name in leases.claim("abc"):
                    with lock:
                        held[name] += 1
                        most[name] = max(most[name], held[name])
                    time.sleep(0.001)
                    with lock:
                        held[name] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == {"a": 1, "b": 1, "c": 1}


def test_the_lease_of_a_silent_host_is_taken_over_by_the_clock_of_who_waits(store):
    someone(store)
    with Leases(store, beat_s=0.05, expires_s=0.3) as leases, listening() as heard:
        assert leases.claim("abc") == {"c"}
        began = time.monotonic()
        leases.wait("ab", "evaluating")
        assert 0.2 < time.monotonic() - began < 3.0
        assert leases.claim("ab") == {"a", "b"}
    assert heard == [], "too short to be told"


def test_signs_of_life_keep_a_lease_and_whoever_waits_is_told_for_whom(store, monkeypatch):
    monkeypatch.setattr("rayclip.data.leases._SAY_S", 0.2)
    someone(store)
    with Leases(store, beat_s=0.05, expires_s=0.3) as leases, listening() as heard:
        waiting = threading.Thread(target=leases.wait, args=("a", "evaluating"))
        waiting.start()
        for beat in range(12):
            time.sleep(0.05)
            someone(store, beat=beat)
            assert waiting.is_alive()
        someone(store, holds=["b"])
        waiting.join(5)
        assert not waiting.is_alive() and leases.claim("ab") == {"a"}
    ((level, sentence),) = heard
    assert level == "note" and "far, process 1" in sentence and store.root in sentence


def test_a_killed_process_of_this_machine_is_known_to_be_dead_at_once(store):
    with Leases(store) as leases:
        leases.claim("a")
        (here,) = holders_in(store)
    with subprocess.Popen(["sleep", "60"]) as process:
        someone(store, machine=here.machine, pid=process.pid)
        with Leases(store) as leases:
            assert leases.claim("a") == set() and len(holders_in(store)) == 1
        process.kill()
    with Leases(store) as leases:
        assert holders_in(store) == [] and leases.claim("a") == {"a"}


def test_one_that_was_stopped_and_comes_back_does_not_hold_what_was_taken_over(store):
    with Leases(store, beat_s=0.05) as leases:
        leases.claim("ac")
        someone(store, holds=["a"])
        deadline = time.monotonic() + 5
        while leases.claim("ac") != {"c"}:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_every_second_of_the_awaited_names_is_given_away(store):
    with Leases(store, beat_s=0.05) as leases, Leases(store, beat_s=0.05) as other:
        leases.claim("abcd")
        waiting = threading.Thread(target=other.wait, args=("bcd", "evaluating"))
        waiting.start()
        deadline = time.monotonic() + 5
        while not (given := leases.give("dcba")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        waiting.join(5)
        assert given == {"d", "b"} == other.claim("abcd")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"pid": "1"}', b'{"host": 1}', b"\xff" * 40])
def test_a_damaged_file_is_no_lease(store, damage):
    store.write(".lease-000000000000.json", damage)
    with Leases(store) as leases:
        assert holders_in(store) == [] and leases.claim("a") == {"a"}
