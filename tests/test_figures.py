"""The documents' figures are those of the committed results."""

import pytest

from bench import figures


@pytest.mark.parametrize("document", figures.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_results_say(document):
    assert figures.replaced(document) == document.read_text(), "run `python -m bench.figures`"


def test_every_device_has_its_newest_file(tmp_path, monkeypatch):
    for name in ("cpu-avx2-2026-01-02", "cpu-avx2-2025-12-31", "nvidia-h200-2026-02-01", "nvidia-h200-2026-01-31"):
        (tmp_path / f"{name}.json").write_text('{"bench": {}}')
    (tmp_path / "nvidia-h200-2026-03-01.json").write_text('{"build": {}, "test": {}}')  # nothing measured
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert {device: file.stem[-10:] for device, file in figures.newest("bench", "update").items()} == {
        "cpu-avx2": "2026-01-02",
        "nvidia-h200": "2026-02-01",
    }
