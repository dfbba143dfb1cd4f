"""The slab holder with the fake driver below it, for a process of its own."""

from __future__ import annotations

from predictor.worker.devices import driver
from predictor.worker.devices.holder import main
from tests.predictor.worker.fake_cuda import connect

if __name__ == "__main__":
    driver.connect = connect  # type: ignore[assignment]
    main()
