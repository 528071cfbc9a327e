"""`make demo`: the usual accumulation depends on the cut, bigbatch does not, and the picture is drawn."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_script("examples/demo.py")


@pytest.mark.slow
def test_demo_shows_what_cuts_change(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "NUM_TEXTS", 300)
    picture = tmp_path / "loss.png"
    losses = demo.run(10, picture)
    printed = capsys.readouterr().out

    assert {way: list(curves) for way, curves in losses.items()} == {key: list(demo.CUTS) for key in demo.WAYS}
    for cut in demo.CUTS:
        start, *_, end = losses["bigbatch"][cut]
        assert end < start - 0.3  # it learns
        assert demo.largest_difference(losses, "bigbatch", cut) < 1e-5
        if cut > 1:
            assert demo.largest_difference(losses, "usual accumulation", cut) > 1e-3
    assert f"{losses['usual accumulation'][16][-1]:.6f}" in printed
    assert "largest difference from the uncut run, bigbatch: " in printed
    assert f"picture: {picture.resolve()}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_too_few_updates_are_refused(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--updates", "3"])
    assert "--updates 3 is too few: the loss is measured every 5 updates" in capsys.readouterr().err


def test_missing_matplotlib_names_the_extra(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        demo.main([])
    assert 'the picture needs matplotlib: pip install "bigbatch[notebooks]"' in capsys.readouterr().err
