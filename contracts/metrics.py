"""Metric names, in one place: predictor and agent export them, the autoscaler and the dashboards read them.

Label `function` is the function's key. Seconds and bytes, as Prometheus asks.
"""

from __future__ import annotations

REQUEST_SECONDS = "sluice_request_seconds"
QUEUE_SECONDS = "sluice_queue_seconds"
SWAP_SECONDS = "sluice_swap_seconds"
RUN_SECONDS = "sluice_run_seconds"
BATCH_ROWS = "sluice_batch_rows"
REQUESTS = "sluice_requests"
REFUSALS = "sluice_refusals"
RETRIES = "sluice_retries"
IN_FLIGHT = "sluice_in_flight_requests"
SEGMENT_USED_BYTES = "sluice_segment_used_bytes"

GPU_SECONDS = "sluice_gpu_seconds"
SWAPS = "sluice_swaps"
SWAPPED_BYTES = "sluice_swapped_bytes"
DEVICE_MEMORY_BYTES = "sluice_device_memory_bytes"
DEVICE_BUSY_SECONDS = "sluice_device_busy_seconds"
HOST_MEMORY_BYTES = "sluice_host_memory_bytes"
LANES = "sluice_lanes"
SHARE_SM_PERCENT = "sluice_share_sm_percent"
SHARE_QUOTA_PERCENT = "sluice_share_quota_percent"

# What the driver says of whole GPUs: every function on one has a part in it.
GPU_BUSY_RATIO = "sluice_gpu_busy_ratio"
GPU_MEMORY_USED_BYTES = "sluice_gpu_memory_used_bytes"
GPU_PCIE_BYTES_PER_SECOND = "sluice_gpu_pcie_bytes_per_second"
GPU_MEMORY_ERRORS = "sluice_gpu_memory_errors"
GPU_THROTTLED = "sluice_gpu_throttled"
