"""The arenas that a connection receives into."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blockstep.nbd.buffers import SIZES, Arena, Pool, ReceiveBuffer


def receive(buffer: ReceiveBuffer, data: bytes) -> None:
    target = buffer.target()
    assert len(target) >= len(data)
    target[:len(data)] = data
    buffer.end += len(data)


def test_an_arena_that_nobody_uses_starts_again_at_the_front() -> None:
    buffer = ReceiveBuffer(Pool())
    arena = buffer.arena
    for _ in range(100):
        receive(buffer, bytes(10_000))
        buffer.start = buffer.end - 10
        buffer.settle()
    assert buffer.arena is arena
    assert buffer.end == 10


def test_an_arena_in_use_is_left_to_its_users_and_comes_back_from_the_last() -> None:
    pool = Pool()
    buffer = ReceiveBuffer(pool)
    first = buffer.arena
    receive(buffer, b"x" * SIZES[0])
    first.users = 2
    buffer.start = SIZES[0] - 3
    buffer.settle()
    assert buffer.arena is not first
    assert bytes(buffer.view[buffer.start:buffer.end]) == b"xxx"
    first.release()
    assert pool.kept == 0
    first.release()
    assert pool.kept == SIZES[0]
    assert pool.take(100) is first


def test_all_buffers_together_have_one_budget_for_large_arenas() -> None:
    pool = Pool(budget=3 * SIZES[1])
    buffers = [ReceiveBuffer(pool) for _ in range(4)]
    assert [_wants(buffer, SIZES[1] - 100) for buffer in buffers] == [True, True, True, False]
    served: list[ReceiveBuffer] = []

    def again() -> bool:
        if buffers[3].settle():
            served.append(buffers[3])
        return bool(served)

    pool.wait(again)
    buffers[0].arena.users = 1
    buffers[0].give_up()
    assert not served
    buffers[0].arena.release()
    assert served == [buffers[3]]
    assert buffers[3].arena.size == SIZES[1]


def test_one_large_arena_is_given_whatever_the_budget_and_can_be_exchanged() -> None:
    pool = Pool(budget=1)
    buffer, other = ReceiveBuffer(pool), ReceiveBuffer(pool)
    assert _wants(buffer, SIZES[0] + 1)
    assert _wants(buffer, SIZES[2])
    assert not _wants(other, SIZES[0] + 1)
    assert _wants(other, SIZES[0] - 100)


def test_who_gets_a_larger_arena_keeps_what_it_received_and_the_one_that_it_gives_back_goes_to_the_next() -> None:
    pool = Pool(budget=SIZES[3] + SIZES[1])
    holder, waiter, next_one = (ReceiveBuffer(pool) for _ in range(3))
    assert _wants(holder, SIZES[3] - 100)
    assert _wants(waiter, SIZES[1] - 100)
    waiter.start = waiter.end
    receive(waiter, b"begun" * 80_000)
    waiter.need = SIZES[2] - 400_000
    assert not waiter.settle()
    assert not _wants(next_one, SIZES[1] - 100)
    pool.wait(waiter.settle)
    pool.wait(next_one.settle)
    holder.give_up()
    assert (waiter.arena.size, next_one.arena.size) == (SIZES[2], SIZES[1])
    assert bytes(waiter.view[waiter.start:waiter.end]) == b"begun" * 80_000
    assert not pool.is_short


def test_a_small_request_behind_large_ones_needs_no_large_arena() -> None:
    pool = Pool(budget=SIZES[1])
    buffer = ReceiveBuffer(pool)
    assert _wants(buffer, SIZES[1] - 100)
    receive(buffer, bytes(SIZES[1] - 100))
    buffer.arena.users = 1
    buffer.start = buffer.end - 10
    buffer.need = 18
    assert buffer.settle()
    assert (buffer.arena.size, buffer.end) == (SIZES[0], 10)


def test_while_somebody_waits_nobody_keeps_a_large_arena_for_what_may_come() -> None:
    pool = Pool(budget=2 * SIZES[1])
    idle, used, waiter = (ReceiveBuffer(pool) for _ in range(3))
    for buffer in (idle, used):
        assert _wants(buffer, SIZES[1] - 100)
        buffer.start = buffer.end
        buffer.need = 28
    used.arena.users = 1
    busy = used.arena
    assert idle.settle()
    assert used.settle()
    assert (idle.arena.size, used.arena.size) == (SIZES[1], SIZES[1])
    assert not _wants(waiter, SIZES[2] - 100)
    pool.wait(waiter.settle)
    assert (idle.arena.size, used.arena.size) == (SIZES[0], SIZES[0])
    assert pool.is_short
    busy.release()
    assert waiter.arena.size == SIZES[2]


def test_requests_that_are_decoded_and_not_begun_keep_their_arena() -> None:
    pool = Pool(budget=SIZES[1])
    buffer, waiter = ReceiveBuffer(pool), ReceiveBuffer(pool)
    assert _wants(buffer, SIZES[1] - 100)
    arena = buffer.arena
    buffer.is_settled, buffer.start = False, buffer.end
    assert not _wants(waiter, SIZES[1] - 100)
    pool.wait(waiter.settle)
    assert buffer.arena is arena
    assert buffer.settle()
    assert (buffer.arena.size, waiter.arena) == (SIZES[0], arena)


def _wants(buffer: ReceiveBuffer, count: int) -> bool:
    if not buffer.end:
        receive(buffer, bytes(28))
    buffer.need = count
    return buffer.settle()


def test_a_large_request_gets_a_large_arena_that_goes_when_no_more_come() -> None:
    buffer = ReceiveBuffer(Pool())
    receive(buffer, bytes(100))
    buffer.need = 5 << 20
    buffer.settle()
    assert buffer.arena.size == SIZES[3]
    assert len(buffer.target()) == 5 << 20
    buffer.start = buffer.end
    buffer.need = 28
    for _ in range(300):
        buffer.settle()
    assert buffer.arena.size == SIZES[0]


def test_the_pool_keeps_no_more_than_its_limit() -> None:
    pool = Pool(limit=SIZES[0] * 2)
    for _ in range(5):
        pool.give_back(Arena(SIZES[0], pool))
    pool.give_back(Arena(SIZES[4], pool))
    assert pool.kept == SIZES[0] * 2


@given(st.lists(st.tuples(st.integers(1, 700_000), st.booleans()), max_size=25))
def test_what_is_in_use_is_never_overwritten(requests: list[tuple[int, bool]]) -> None:
    """Requests of any size, received in pieces; some stay in use to the end."""
    buffer = ReceiveBuffer(Pool())
    kept: list[tuple[Arena, memoryview, int]] = []
    for number, (size, stays) in enumerate(requests):
        left = size
        while left:
            buffer.need = left
            buffer.settle()
            piece = min(left, len(buffer.target()), 200_000)
            receive(buffer, bytes([number]) * piece)
            left -= piece
        payload = buffer.view[buffer.start:buffer.end]
        assert len(payload) == size
        buffer.start = buffer.end
        if stays:
            buffer.arena.users += 1
            kept.append((buffer.arena, payload, number))
        buffer.need = 28
        buffer.settle()
    for arena, payload, number in kept:
        assert bytes(payload) == bytes([number]) * len(payload)
        arena.release()
