"""What `corefit check` says fits, fits: tiny networks under a limit of memory that every operation enforces."""

from __future__ import annotations

import pytest

from benchmarks.memory import NEAR, Case, measure

FEW = (0, 2, 9)
"""Cases that differ in family, objective and what trains; `python -m benchmarks memory` runs more of them."""


@pytest.mark.parametrize("number", FEW)
def test_what_fits_by_the_estimate_fits(number: int) -> None:
    outcome = measure(Case.draw(number))
    assert outcome.died == ""
    assert abs(outcome.error) <= NEAR, f"{outcome.estimated:.0f} bytes estimated, {outcome.measured} measured"


def test_the_limit_is_enforced() -> None:
    """A run that may have a tenth less than its estimate dies, and says of what."""
    plain = measure(Case.draw(0), limit=1e12)
    short = measure(Case.draw(0), limit=0.9 * plain.estimated)
    assert "out of memory" in short.died
    assert short.measured < plain.measured


@pytest.mark.slow
@pytest.mark.parametrize("number", [number for number in range(20) if number not in FEW])
def test_twenty_random_pipelines_fit(number: int) -> None:
    outcome = measure(Case.draw(number))
    assert outcome.died == ""
    assert abs(outcome.error) <= NEAR
