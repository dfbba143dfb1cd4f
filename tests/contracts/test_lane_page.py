import multiprocessing
import os

import pytest

from contracts.lane_page import PAGE_BYTES, LanePage


@pytest.fixture
def fd():
    made = LanePage.create()
    yield made
    os.close(made)


def test_a_new_page_asks_for_nothing(fd):
    page = LanePage(fd)
    assert (os.fstat(fd).st_size, page.pause_batch) == (PAGE_BYTES, 0)
    page.close()


@pytest.mark.parametrize("batch", [1, 2**32, 2**63 + 5])
def test_what_one_mapping_writes_the_other_reads(fd, batch):
    agent, lane = LanePage(fd), LanePage(fd)
    agent.pause_batch = batch
    assert lane.pause_batch == batch
    agent.pause_batch = 0
    assert lane.pause_batch == 0
    agent.close()
    lane.close()


def test_the_page_outlives_its_descriptor_and_a_mapping(fd):
    agent = LanePage(fd)
    copy = os.dup(fd)
    lane = LanePage(copy)
    os.close(copy)
    agent.pause_batch = 9
    agent.close()
    assert lane.pause_batch == 9
    lane.close()


def _pause(fd, batch):
    page = LanePage(fd)
    page.pause_batch = batch
    page.close()


def test_a_forked_process_shares_the_page(fd):
    page = LanePage(fd)
    child = multiprocessing.get_context("fork").Process(target=_pause, args=(fd, 77))
    child.start()
    child.join(30)
    assert (child.exitcode, page.pause_batch) == (0, 77)
    page.close()


def test_closing_leaves_no_mapping(fd):
    def mapped():
        with open("/proc/self/maps") as maps:
            return maps.read().count("memfd:sluice-lane")

    before = mapped()
    page = LanePage(fd)
    assert mapped() == before + 1
    page.close()
    assert mapped() == before
