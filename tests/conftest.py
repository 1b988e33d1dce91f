"""Settings of the whole test suite: one thread, no network, and nothing that depends on how fast a machine is.

Warnings of our own modules are errors; `setup.cfg` has those of others that are not shown, and why.
"""

import os

from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Hypothesis would fail an example that takes longer than 200 ms, and a test whose examples are slow to make.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
