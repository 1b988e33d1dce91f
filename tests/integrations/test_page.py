"""The blocks of docs/integrations.md run, with the tools that they are about."""

from tests.test_docs import ROOT, run_page


def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    run_page(ROOT / "docs" / "integrations.md", tmp_path, monkeypatch)
