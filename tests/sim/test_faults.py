"""Each fault of `faults.py` can be applied."""

import pytest

from tests.sim.faults import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.part}: {fault.what}")
def test_a_faults_text_is_in_its_file_once(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.text) == 1
