"""Measures a link that is not there; FAKE_LINK=broken: torch finds no device."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if os.environ.get("FAKE_LINK") == "broken":
        sys.exit("no CUDA device is available")
    print('{"h2d_bytes_per_s": 55000000000, "d2h_bytes_per_s": 52000000000}')
