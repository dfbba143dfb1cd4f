"""The fake GPUs of a machine, as `nodeagent.shell.cuda_driver` lists real ones.

FAKE_GPUS says how many there are, FAKE_DRIVER the driver's version; with FAKE_NVLINK all of them are linked.
"""

from __future__ import annotations

import json
import os

from tests.fakes import gpu


def main() -> None:
    count = int(os.environ.get("FAKE_GPUS", 2))
    found = [
        {
            "uuid": gpu.uuid(index),
            "name": "Fake H100",
            "sms": gpu.SMS,
            "capability": [9, 0],
            "total_bytes": gpu.TOTAL_BYTES,
            "driver": int(os.environ.get("FAKE_DRIVER", 13000)),
            "bus_id": f"ffff:0{index}:00.0",
            "mig": False,
            "peers": [gpu.uuid(other) for other in range(count) if other != index] if "FAKE_NVLINK" in os.environ else [],
        }
        for index in range(count)
    ]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(json.dumps([one for one in found if shown is None or one["uuid"] in shown.split(",")]))


if __name__ == "__main__":
    main()
