"""How many rows go through the VAE at once: as many as fit, found before or after memory ran out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define, field
from conftest import WORDS

from corefit.data import coding
from corefit.data.coding import Coder, fitting, row_bytes
from corefit.system import memory
from corefit.testing import tiny_sd3, tiny_wan
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan


@define
class Toy:
    """Encodes by doubling, and runs out of memory with more rows than `room`."""

    room: int
    calls: list[int] = field(factory=list)
    error: type[Exception] = MemoryError

    def encode(self, media: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(media))
        if len(media) > self.room:
            raise self.error
        return media * 2

    decode = encode


def test_rows_are_halved_until_they_fit_and_stay_so() -> None:
    toy, said = Toy(room=3), list[str]()
    coder, media = Coder(toy, said.append), torch.arange(12.0).reshape(12, 1)  # type: ignore[arg-type]
    assert torch.equal(coder.encode(media), media * 2)
    assert toy.calls == [12, 6, 3, 3, 3, 3]
    assert [text.split("; ")[1] for text in said] == ["6 from now on", "3 from now on"]
    assert torch.equal(coder.encode(media[:5]), media[:5] * 2)
    assert toy.calls[6:] == [3, 2]
    assert torch.equal(coder.decode(media[:3]), media[:3] * 2)  # which has rows of its own


def test_one_row_that_does_not_fit_and_other_errors_are_raised() -> None:
    with pytest.raises(MemoryError):
        Coder(Toy(room=0)).encode(torch.zeros(2, 1))  # type: ignore[arg-type]
    toy = Toy(room=1, error=RuntimeError)
    with pytest.raises(RuntimeError):
        Coder(toy).encode(torch.zeros(2, 1))  # type: ignore[arg-type]
    assert toy.calls == [2]


def test_rows_that_fit() -> None:
    total = 100.0 / coding.SHARE
    assert [fitting(rows, 30, total) for rows in (1, 3, 16)] == [1, 3, 3]
    assert fitting(16, 1000, total) == 1
    assert fitting(16, None, total) == 16


def test_a_small_first_batch_is_no_limit_for_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fit are those of the estimate, which is said when a batch is first cut for it."""
    monkeypatch.setattr(coding, "row_bytes", lambda *_: 100)
    monkeypatch.setattr(memory, "total", lambda: int(400 / coding.SHARE))
    toy, said = Toy(room=99), list[str]()
    coder, media = Coder(toy, said.append), torch.ones(9, 1)  # type: ignore[arg-type]
    for rows in (2, 3, 9, 9):
        coder.encode(media[:rows])
    assert toy.calls == [2, 3, *(4, 4, 1) * 2]
    assert len(said) == 1
    assert said[0].startswith("encode: 4 of 9 at once (")


def test_what_an_estimate_allows_is_taken_at_once_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = Sd3(str(tiny_sd3(tmp_path / "base", words=WORDS, layers=1)))
    backbone.place(torch.device("cpu"), torch.float32)
    media, said, seen = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), list[str](), list[int]()
    whole = backbone.encode(media)
    each = row_bytes(backbone, "encode", media.shape[1:])
    assert each
    with torch.no_grad(), memory.track_live_bytes() as held:
        backbone.encode(media[:1].clone())
    assert each == pytest.approx(held.peak, rel=0.05)
    real = type(backbone).encode
    monkeypatch.setattr(Sd3, "encode", lambda self, part: seen.append(len(part)) or real(self, part))
    monkeypatch.setattr(memory, "total", lambda: int(2.5 * each / coding.SHARE))
    found = Coder(backbone, said.append).encode(media)
    assert seen == [1, 2, 2, 1]  # the first is the estimate
    assert (found - whole).abs().max() < 1e-5
    assert said[0].startswith("encode: 2 of 5 at once (")
    seen.clear()
    monkeypatch.setattr(memory, "total", lambda: 1 << 40)
    Coder(backbone).encode(media)
    assert seen == [5]


def test_long_clips_are_told_by_short_ones(tmp_path: Path) -> None:
    backbone: Any = Wan(str(tiny_wan(tmp_path / "base", words=WORDS)))
    shape = (4, 8, 8, 8)
    whole = coding._peak(backbone, "decode", shape)
    assert whole
    assert row_bytes(backbone, "decode", shape) == pytest.approx(whole, rel=0.05)
