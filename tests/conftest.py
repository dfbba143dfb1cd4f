"""How hypothesis runs here: the same examples every time and no clock, so that what passes once passes on a slow machine too.

`pytest --hypothesis-profile=default` looks for new examples.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], print_blob=True
)
settings.load_profile("steady")
