"""Every public format loads by its header, and a file that is none of them says so."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import InvalidArtifact
from contracts.units import S
from simulator.traces import read

DATA = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "traces"
here = pytest.mark.skipif(not DATA.is_dir(), reason="the sample traces are not here (SLUICE_DATA)")


def chance() -> np.random.Generator:
    return np.random.default_rng(1)


@here
@pytest.mark.parametrize(
    ("name", "requests", "functions", "span_s"),
    [
        ("azure-functions-2021-sample.csv.gz", 199, None, None),
        ("azure-llm-2023-conv.csv.gz", 19_366, 1, 3600),
        ("alibaba-genai-2024-nov.csv.gz", None, None, 15 * 86_400),
        ("has-gpu-stages.json", None, 2, 250),
    ],
)
def test_a_sample(name: str, requests: int | None, functions: int | None, span_s: int | None) -> None:
    trace = read(DATA / name, chance())
    assert len(trace) == requests or requests is None
    assert len(trace.names) == functions or functions is None
    assert span_s is None or trace.span_ns / S == pytest.approx(span_s, rel=0.1)
    assert (np.diff(trace.at_ns) >= 0).all()
    assert trace.at_ns[0] >= 0
    assert trace.at_ns[-1] < trace.span_ns
    assert set(np.unique(trace.function)) <= set(range(len(trace.names)))


def test_calls_a_minute_stay_in_their_minute(tmp_path: Path) -> None:
    path = tmp_path / "invocations_per_function_md.anon.d01.csv"
    minutes = ",".join(map(str, range(1, 1441)))
    path.write_text(f"HashOwner,HashApp,HashFunction,Trigger,{minutes}\no,a,f,http,{'2,' * 1439}0\no,a,g,http,{'0,' * 1439}5\n")
    trace = read(path, chance())
    assert trace.names == ("a/f", "a/g")
    assert trace.span_ns == 86_400 * S
    minutes_of = trace.at_ns // (60 * S)
    assert np.bincount(minutes_of[trace.function == 0], minlength=1440).tolist() == [2] * 1439 + [0]
    assert set(minutes_of[trace.function == 1]) == {1439}


def test_a_call_of_2021_came_when_it_began(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("app,func,end_timestamp,duration\na,f,12.5,2.5\na,g,9.0,1.0\n")
    trace = read(path, chance())
    assert trace.at_ns.tolist() == [0, 2 * S]
    assert [trace.names[number] for number in trace.function] == ["a/g", "a/f"]


def test_burstgpt(tmp_path: Path) -> None:
    path = tmp_path / "BurstGPT_1.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,1,2,3,Conversation log\n9,GPT-4,1,2,3,API log\n")
    trace = read(path, chance())
    assert trace.names == ("ChatGPT", "GPT-4")
    assert trace.at_ns.tolist() == [0, 4 * S]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n1,2\n",
        b"arrival_s,model\n",
        b"arrival_s,model\nsoon,m\n",
        b"arrival_s,model\nnan,m\n",
        b"arrival_s,model\n-1,m\n",
        b"arrival_s,model\n1,m\n1,m,too,many\n",
        b"\x1f\x8b\x08torn",
    ],
)
def test_what_is_no_trace_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"odd\.csv"):
        read(path, chance())


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a": {"stage_s": 5}}', b'{"a": {"stage_s": 5, "requests_per_stage": [-1]}}'])
def test_stages_that_are_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"odd\.json"):
        read(path, chance())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=r"gone\.csv"):
        read(tmp_path / "gone.csv", chance())
