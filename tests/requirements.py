"""Marks for tests that compare with PyTorch, or read and write its files; `make test-tf-only` runs without it."""

import importlib.util

import pytest

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
