"""How fast the simulator is on one core: simulated requests a second of processor time, and how the cost grows with the world.

The world is that of a cluster of shared GPUs: vision and text models of which half fit, on nodes of four devices.
"""

from __future__ import annotations

import time

from benchmarks.result import Metric
from simulator.run import simulate
from simulator.scenario import Devices, Group, Load, Scenario, Times, World, build

SEED = 1
_FUNCTIONS, _NODES = 1000, 6
_REQUESTS, _QUICK_REQUESTS = 200_000, 20_000


def world(functions: int, nodes: int, requests: int, *, per_minute: tuple[float, float] = (5, 30), memory: str = "32Gi") -> World:
    """`functions` on `nodes` of four devices with about so many requests in all; `per_minute`: of one function, from and to."""
    text = functions // 4
    load = Load(per_minute=list(per_minute))
    scenario = Scenario(
        name="speed",
        span_s=requests / (functions * sum(per_minute) / 2 / 60),
        devices=Devices(count=4, nodes=nodes, memory=memory, link_gb_per_s=12.0, per_link=2),
        functions=[
            Group("vision", load, Times(fixed_ms=6, row_ms=4), "98Mi", count=functions - text, slo_ms=80),
            Group("text", load, Times(fixed_ms=8, row_ms=10), "418Mi", count=text, slo_ms=200),
        ],
    )
    return build(scenario, SEED)


def requests_per_s(of: World) -> float:
    """Requests over the processor seconds that their simulation takes, building the world not counted."""
    begun = time.process_time()
    simulate("sluice", of)
    return len(of.arrivals) / (time.process_time() - begun)


def measure(quick: bool) -> dict[str, Metric]:
    """All figures of this part."""
    requests = _QUICK_REQUESTS if quick else _REQUESTS
    return {"requests_per_s": Metric(requests_per_s(world(_FUNCTIONS, _NODES, requests)), "requests/s", 25_000, "higher")}
