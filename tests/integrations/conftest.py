"""Tests with real tools, of the extra `integrations` (`make test-integrations`); without it none is collected."""

import importlib.util

if importlib.util.find_spec("bitsandbytes") is None:
    collect_ignore_glob = ["test_*.py"]
