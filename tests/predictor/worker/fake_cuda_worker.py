"""The fork server with the fake driver below it, for a process of its own."""

from __future__ import annotations

from predictor.worker.__main__ import main
from predictor.worker.devices import driver
from tests.predictor.worker.fake_cuda import connect

if __name__ == "__main__":
    driver.connect = connect  # type: ignore[assignment]
    main()
