"""The contract as JSON, of this version's engines and of earlier ones."""

from dataclasses import replace

import pytest

from engines.contract import TOP_K, Contract, top_k_for
from quasar.errors import DamagedEngineError

# As engines were written before there was `top_k`: their hash is over these bytes.
EARLIER = {
    "num_layers": 30,
    "num_kv_heads": 3,
    "head_size": 64,
    "vocab_size": 49152,
    "max_length": 4096,
    "capacity": 4160,
    "max_width": 32,
    "prefill_chunk": 256,
    "max_batch": 1,
    "tree_mask": False,
    "kv_dtype": "float32",
}


def test_a_contract_survives_a_round_trip():
    contract = replace(Contract.from_json(EARLIER), top_k=8)
    assert contract.to_json() == {**EARLIER, "top_k": 8}
    assert Contract.from_json(contract.to_json()) == contract


def test_an_earlier_contract_has_no_top_tokens_and_keeps_its_json():
    contract = Contract.from_json(EARLIER)
    assert contract.top_k == 0
    assert list(contract.to_json().items()) == list(EARLIER.items())


@pytest.mark.parametrize(
    ("top_k", "message"),
    [
        (-1, "sizes that do not fit each other"),
        (49153, "sizes that do not fit each other"),
        ("8", "contract.top_k is '8'; int was expected"),
        (True, "contract.top_k is True; int was expected"),
    ],
)
def test_a_top_k_that_does_not_fit(top_k, message):
    with pytest.raises(DamagedEngineError, match=message):
        Contract.from_json({**EARLIER, "top_k": top_k})
    assert Contract.from_json({**EARLIER, "top_k": 49152}).top_k == 49152


def test_new_engines_name_eight_tokens_or_all_there_are():
    assert TOP_K == 8
    assert [top_k_for(size) for size in (5, 8, 49152)] == [5, 8, 8]
