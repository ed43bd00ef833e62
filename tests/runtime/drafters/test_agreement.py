"""Engines whose vocabularies differ in tokens that no sequence has."""

import json
import shutil

import numpy as np
import pytest

from engines.loading import load_engine
from quasar.errors import GenerationError
from runtime.drafters.agreement import check_vocabularies
from runtime.drafters.draft_engine import DraftEngine, EngineDrafter
from tests.runtime.drafters.test_draft_engine import sign


@pytest.fixture
def changed(tiny_engine, tmp_path):
    """Copies the engine with another tokenizer: `edit` gets its JSON."""

    def change(edit):
        folder = shutil.copytree(tiny_engine, tmp_path / "other")
        words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        edit(words)
        (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
        sign(folder)
        return folder

    return change


def rename(token):
    def edit(words):
        (entry,) = (one for one in words["added_tokens"] if one["id"] == token)
        entry["content"] = "<|reserved_special_token_7|>"

    return edit


def add(words):
    words["added_tokens"].append({**words["added_tokens"][-1], "id": 260, "content": "<|more|>"})


def check(tiny_engine, other):
    return [
        check_vocabularies(load_engine(one).directory, load_engine(two).directory)
        for one, two in ((tiny_engine, other), (other, tiny_engine))
    ]


@pytest.mark.parametrize(("edit", "token"), [(rename(257), 257), (add, 260)], ids=["another name", "one more"])
def test_special_tokens_that_end_nothing_may_differ(tiny_engine, changed, edit, token):
    assert check(tiny_engine, changed(edit)) == [{token}, {token}]


def test_an_end_token_may_not_differ(tiny_engine, changed):
    other = changed(rename(256))
    with pytest.raises(GenerationError, match=r"token 256 is '<\|reserved_special_token_7\|>' there and '<\|end\|>'"):
        check(tiny_engine, other)


def test_drafts_are_cut_before_a_token_that_differs(tiny_engine):
    engine = load_engine(tiny_engine)
    context = np.arange(20)
    whole = EngineDrafter(DraftEngine(engine), "model", 320).propose(context, 6).tokens
    place = next(place for place in range(1, 6) if whole[place] not in whole[:place])
    unlike = frozenset({int(whole[place])})
    cut = EngineDrafter(DraftEngine(engine, unlike=unlike), "model", 320).propose(context, 6).tokens
    np.testing.assert_array_equal(cut, whole[:place])
