"""Models on one node compute one after the other, and nobody waits for one that is gone or stopped."""

import multiprocessing
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from actors.replica.turns import Turns

LONG_S = 600.0
"""Longer than a test may take: who waits for a turn in vain fails."""


def test_one_computes_at_a_time(tmp_path: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def compute() -> None:
        nonlocal inside, most
        turns = Turns(tmp_path, patience_s=LONG_S)
        for _ in range(20):
            with turns.take():
                with lock:
                    inside += 1
                    most = max(most, inside)
                threading.Event().wait(0.0005)
                with lock:
                    inside -= 1
        turns.close()

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert most == 1
    assert inside == 0


def test_a_turn_is_given_back_when_its_work_fails(tmp_path: Path) -> None:
    one, other = Turns(tmp_path), Turns(tmp_path, patience_s=LONG_S)
    try:
        with one.take():
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with other.take():
        pass
    one.close()
    other.close()


def test_who_has_waited_long_enough_goes_on(tmp_path: Path) -> None:
    stopped, waiting = Turns(tmp_path), Turns(tmp_path, patience_s=0.05)
    with stopped.take():
        with waiting.take():
            pass
        # It took nothing that was not its own.
        with waiting.take():
            pass
    # What it still asked for is given back when it comes.
    third = Turns(tmp_path, patience_s=LONG_S)
    with third.take():
        pass
    with waiting.take():
        pass
    third.close()
    stopped.close()
    waiting.close()


def _take_and_wait(connection: Connection, meeting_place: Path) -> None:
    with Turns(meeting_place).take():
        connection.send("taken")
        connection.recv()


def test_a_process_that_is_killed_gives_its_turn_back(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=_take_and_wait, args=(other, tmp_path))
    process.start()
    assert connection.recv() == "taken"
    process.kill()
    process.join()
    turns = Turns(tmp_path, patience_s=LONG_S)
    with turns.take():
        pass
    turns.close()
