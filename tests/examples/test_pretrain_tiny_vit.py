from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import autopeft

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_tiny_vit.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_model_and_images_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("pretrain_tiny_vit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setenv("AUTOPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pretrain_tiny_vit.py", "--epochs", "1"])
    script.main()
    seen = autopeft.preview(model=str(tmp_path / "tiny-vit"), data=str(tmp_path / "digits"))
    assert seen.data.headline() == "task image-classification (image=image, label=label)"
    assert seen.rows[0].inputs == (("pixel_values", "3 x 32 x 32"),)
