import threading

import pytest
import torch

from clinfuse.functional.cores import on_every_core


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_parts_from_one_core_a_part(two_threads):
    meeting = threading.Barrier(2, timeout=20)  # passed by two at a time only

    def square(part):
        meeting.wait()
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return part**2

    assert on_every_core(square, range(6)) == [0, 1, 4, 9, 16, 25]
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


def test_one_thread_or_one_part_is_done_where_it_is_asked_for(one_thread):
    def where(_):
        assert not torch.is_grad_enabled()
        return threading.current_thread()

    assert set(on_every_core(where, range(3))) == {threading.current_thread()}
    torch.set_num_threads(2)
    assert on_every_core(where, [0]) == [threading.current_thread()]
    assert on_every_core(where, []) == []


def test_parts_may_have_parts_of_their_own(two_threads):
    found = on_every_core(lambda n: sum(on_every_core(lambda m: n * m, range(4))), range(4))
    assert found == [0, 6, 12, 18]


def test_parts_may_write_into_what_inference_mode_has_made(two_threads):
    with torch.inference_mode():
        whole = torch.zeros(4)
        on_every_core(lambda n: whole[n : n + 1].fill_(n), range(4))
    assert whole.tolist() == [0, 1, 2, 3]


def test_an_error_in_a_part_is_raised_and_torch_has_its_threads_back(two_threads):
    with pytest.raises(ZeroDivisionError):
        on_every_core(lambda part: 1 / part, range(4))
    assert torch.get_num_threads() == 2
