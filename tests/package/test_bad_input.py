"""Nothing wrong gets through in silence: every row of `bad_inputs/` raises its error, which says what is wrong."""

import re

import pytest
from bad_inputs import rows

ROWS = rows()


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_refused_by_name(name, tmp_path, monkeypatch):
    row = ROWS[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(row.error) as caught:
        row.call(tmp_path)
    assert type(caught.value) is row.error
    assert re.search(row.message, str(caught.value)), str(caught.value)
