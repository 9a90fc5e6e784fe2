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
