"""The fake GPUs of a machine, as `nodeagent.shell.cuda_driver` lists real ones.

FAKE_GPUS says how many there are, FAKE_DRIVER the driver's version.
"""

from __future__ import annotations

import json
import os

from tests.fakes import gpu


def main() -> None:
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
        }
        for index in range(int(os.environ.get("FAKE_GPUS", 2)))
    ]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(json.dumps([one for one in found if shown is None or one["uuid"] == shown]))


if __name__ == "__main__":
    main()
