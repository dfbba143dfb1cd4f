from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiohttp import web

from contracts.functions import Function, ModelFormat, ModelRef, Share, Slo
from contracts.status import NodeStatus
from contracts.units import MS
from sluice.demo import report
from sluice.demo.load import Answer, Load, Reply, Target, decode_answer, rate_for, request_body, session
from sluice.demo.run import batches_of
from sluice.demo.work import Batch, Task, write_tasks

FUNCTION = Function(name="a", model=ModelRef(ModelFormat.CATALOG, "mlp?features=8"), slo=Slo(100 * MS, 98.0), share=Share(100, 2000))
NOTHING = NodeStatus(pid=1, uptime_ns=2, host_used_bytes=3, host_budget_bytes=4, devices=(), functions=())


def test_floats_keep_their_bits_on_the_way_through_json() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], np.array([0.0, -0.0, 1e-45, np.finfo(np.float32).max], np.float32)])

    sent = msgspec.json.decode(request_body({"x": values.reshape(1, -1)}))["inputs"][0]
    back = decode_answer(msgspec.json.encode({"outputs": [sent]})).outputs["x"]

    assert (sent["datatype"], sent["shape"]) == ("FP32", [1, len(values)])
    assert back.tobytes() == values.tobytes()


def answer(batch: int, row: int, rows: int, own: int = 1) -> Answer:
    return Answer({"y": np.zeros((own, 2), np.float32)}, {"sluice_batch": batch, "sluice_batch_row": row, "sluice_batch_rows": rows})


BATCHES = {
    "one request is a batch": ({7: answer(1, 0, 1)}, {}, [(7,)]),
    "members come in row order": ({1: answer(1, 2, 3), 2: answer(1, 0, 3, own=2)}, {}, [(2, 1)]),
    "equal ids of two processes are two batches": ({1: answer(1, 0, 1), 2: answer(1, 0, 1)}, {1: "10", 2: "11"}, [(1,), (2,)]),
    "a batch with a stranger cannot be put together": ({1: answer(1, 0, 3), 2: answer(1, 2, 3)}, {}, []),
    "nor one whose last rows are missing": ({1: answer(1, 0, 2)}, {}, []),
    "nor an answer without its place": ({1: Answer({"y": np.zeros((1, 1))}, {})}, {}, []),
}


@pytest.mark.parametrize(("answers", "instances", "expected"), BATCHES.values(), ids=BATCHES)
def test_batches_are_put_together_from_their_parameters(
    answers: dict[int, Answer], instances: dict[int, str], expected: list[tuple[int, ...]]
) -> None:
    assert batches_of(answers, {number: instances.get(number, "") for number in answers}) == expected


RATES = {
    "two fifths of what the share guarantees": (0.1, 100, 0.8),
    "no more than the front can parse": (0.0001, 100, 12.0),
    "no more bytes than the front can parse": (0.0001, 4_000_000, 0.5),
    "never nothing": (100.0, 100, 0.25),
}


@pytest.mark.parametrize(("run_s", "body_bytes", "rate"), RATES.values(), ids=RATES)
def test_the_rate_follows_the_share(run_s: float, body_bytes: int, rate: float) -> None:
    assert rate_for(FUNCTION, run_s, body_bytes) == pytest.approx(rate)


def test_percentiles_are_by_nearest_rank() -> None:
    latencies = [number / 1000 for number in range(1, 101)]

    assert [report.percentile_ms(latencies, percent) for percent in (50, 95, 99, 100)] == pytest.approx([50, 95, 99, 100])
    assert report.percentile_ms([0.004], 99) == pytest.approx(4)
    assert report.percentile_ms([], 99) == 0


def reply(status: int = 200, latency_s: float = 0.01, *, warm_up: bool = False) -> Reply:
    return Reply(0, status, latency_s, b"x" if status == 200 else b"", error="" if status == 200 else f"{status}: why", warm_up=warm_up)


def judged(replies: list[Reply], checked: report.Checked) -> report.Report:
    return report.make([Target(FUNCTION, [b""], 1.0, replies)], {"default/a": checked}, NOTHING, NOTHING, 2.0, 5)


def test_the_warm_up_counts_for_the_check_but_not_for_the_figures() -> None:
    found = judged([reply(latency_s=9, warm_up=True), reply(), reply(latency_s=0.2)], report.Checked(right=3))

    line = found.functions[0]
    assert found.passed
    assert (line.sent, line.answered, line.rate, line.right) == (2, 2, 1.0, 3)
    assert (line.p99_ms, line.slo_met_percent) == (pytest.approx(200), 50)
    assert "3 answers of 1 functions" in found.verdict


VERDICTS = {
    "a wrong answer fails": ([reply()], report.Checked(right=0, wrong=1), False),
    "an answer that cannot be checked fails": ([reply(), reply()], report.Checked(right=1, unchecked=1), False),
    "an accepted request without an answer fails": ([reply(), reply(503)], report.Checked(right=1), False),
    "silence fails": ([reply(429)], report.Checked(), False),
    "a refusal does not fail": ([reply(), reply(429)], report.Checked(right=1), True),
    "a missed objective does not fail": ([reply(latency_s=5)], report.Checked(right=1), True),
}


@pytest.mark.parametrize(("replies", "checked", "passed"), VERDICTS.values(), ids=VERDICTS)
def test_the_verdict(replies: list[Reply], checked: report.Checked, passed: bool) -> None:
    found = judged(replies, checked)

    assert found.passed is passed
    assert found.verdict.startswith("PASSED" if passed else "FAILED")


@pytest.mark.asyncio
async def test_an_open_loop_does_not_wait_for_answers() -> None:
    waiting: list[bytes] = []
    release = asyncio.Event()

    async def infer(request: web.Request) -> web.Response:
        waiting.append(await request.read())
        if len(waiting) == 5:
            release.set()
        await release.wait()
        return web.json_response({"outputs": []}) if len(waiting) % 2 else web.json_response({"error": "busy"}, status=429)

    app = web.Application()
    app.router.add_post("/v2/models/a/infer", infer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    target = Target(FUNCTION, [b"body"], rate=40.0)
    async with session() as http:
        # Nothing is answered before five requests are in flight: a loop that waited would never end.
        await Load(f"http://127.0.0.1:{port}", http, lambda: None).drive([target], 0.5, seed=3)
    await runner.cleanup()

    assert len(target.replies) == len(waiting) >= 5
    assert all(entry.answered or (entry.refused and "busy" in entry.error) for entry in target.replies)


@pytest.mark.asyncio
async def test_a_node_that_has_gone_is_a_reply_without_an_answer() -> None:
    target = Target(FUNCTION, [b"body"])
    async with session() as http:
        found = await Load("http://127.0.0.1:1", http, lambda: None).ask(target, 0, 0.0)

    assert not found.answered
    assert not found.refused
    assert "no answer" in found.error


class TestChecker:
    """The checker on a real model: it must see a single wrong bit."""

    @pytest.fixture
    def task(self, tmp_path: Path) -> Task:
        from sluice.demo import check

        task = Task(0, FUNCTION.key, FUNCTION.model, 3, 0)
        write_tasks(tmp_path, [task])
        check.write_inputs(tmp_path, task)
        return task

    def answers(self, folder: Path, task: Task) -> tuple[dict[str, np.ndarray], str]:
        import torch

        from models.load import load

        inputs = np.load(folder / task.inputs_file)
        name = inputs.files[0].partition("/")[2]
        rows = torch.from_numpy(np.concatenate([inputs[f"{sample}/{name}"] for sample in (2, 0)]))
        outputs = {output: tensor.numpy() for output, tensor in load(FUNCTION.model).run({name: rows}).items()}
        (folder / task.batches_file).write_bytes(msgspec.json.encode([Batch((11, 10), (2, 0))]))
        output = next(iter(outputs))
        return {f"11/{output}": outputs[output][:1], f"10/{output}": outputs[output][1:]}, output

    def test_the_same_batch_is_right(self, tmp_path: Path, task: Task) -> None:
        from sluice.demo import check

        np.savez(tmp_path / task.answers_file, **self.answers(tmp_path, task)[0])  # type: ignore[arg-type]

        assert [(result.right, result.wrong) for result in check.check_answers(tmp_path, task)] == [(2, 0)]

    def test_one_bit_is_wrong(self, tmp_path: Path, task: Task) -> None:
        from sluice.demo import check

        arrays, output = self.answers(tmp_path, task)
        broken = arrays[f"10/{output}"].copy()
        broken.view(np.uint32)[0, 0] ^= 1
        np.savez(tmp_path / task.answers_file, **arrays | {f"10/{output}": broken})  # type: ignore[arg-type]

        (result,) = check.check_answers(tmp_path, task)
        assert (result.right, result.wrong) == (1, 1)
        assert "request 10" in result.detail
        assert "differs" in result.detail
