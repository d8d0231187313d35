"""`cliptune doctor` on a Mac, as far as a machine without one can tell."""

from __future__ import annotations

from tests.support.fake_mps.library import run_on_fake_mps


def test_a_mac_can_run_every_proof_without_a_foreign_tensor_a_missing_operator_or_float64() -> None:
    report = run_on_fake_mps("tests.mps.doctoring")
    # The very sum that M1 and M2 are suspected of.
    (long_sum,) = report.pop("long sums")
    assert "sums over 40000" in long_sum
    assert len(report) > 10
    assert not {name: found for name, found in report.items() if found}
