"""From the text of a grammar to what follows an answer along it: compiled once for an engine, within limits."""

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quasar.errors import GrammarError
from quasar.text import TextCodec
from runtime.grammar.formats import Grammar
from runtime.grammar.matcher import GrammarState
from runtime.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Compiled grammars that an engine keeps.
_KEPT = 64
# What a grammar may take: states and steps of its automata. A mask takes 0.05 ms as a rule, 25 ms where a row of an
# ambiguous grammar is near its limit, and 0.2 s once where a step comes to its own; compiling takes a second at most. A
# row of 600 items is an object of about 150 optional properties.
_LIMITS = {
    "max_items_in_row": 600,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Between the parts of JSON: a few spaces, or a new line with its indentation. A model may write spaces without end.
WHITESPACE = r"[\x20\x09]{1,4}|\x0D?\x0A[\x20\x09]{0,40}"
# Characters of llguidance's reasons that are shown.
_SHOWN = 300


@dataclass(slots=True)
class _Compiling:
    """A grammar that is being compiled: who else wants it waits for the lock, and then has the result, or the error."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    error: GrammarError | None = None


class Grammars:
    """The grammars of one engine's requests. Thread-safe; nothing of llguidance is imported before the first one."""

    def __init__(self, codec: TextCodec, *, vocab_size: int, end_ids: Collection[int]) -> None:
        """`end_ids`: the model's, each of which ends an answer where its grammar may end."""
        self._codec, self._vocab_size, self._end_ids = codec, vocab_size, frozenset(end_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._compiling: dict[Grammar, _Compiling] = {}

    def start(self, grammar: Grammar, *, other_ends: Collection[int] = ()) -> GrammarState:
        """The state of an answer that begins, for one request.

        `other_ends`: tokens that are no text and end this answer, too.

        Raises:
            GrammarError: llguidance is missing, or the grammar cannot be compiled within the limits.
        """
        return GrammarState(
            self._known(grammar).deep_copy(),
            renew=lambda: self._renew(grammar),
            vocab_size=self._vocab_size,
            other_ends=frozenset(other_ends) - self._end_ids,
        )

    def _known(self, grammar: Grammar) -> "LLMatcher":
        """Compiled once, whoever else asks for it meanwhile: the answers of one request begin together."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled
            compiling = self._compiling.setdefault(grammar, _Compiling())
        with compiling.lock:
            if compiling.error is not None:
                # Who waited would fail as the first one did, after as long.
                raise GrammarError(str(compiling.error))
            with self._lock:
                compiled = self._compiled.get(grammar)
            if compiled is None:
                try:
                    compiled = self._compile(grammar)
                    with self._lock:
                        self._compiled[grammar] = compiled
                        while len(self._compiled) > _KEPT:
                            self._compiled.popitem(last=False)
                except GrammarError as error:
                    compiling.error = error
                    raise
                finally:
                    # After it is kept: who came in between would compile it again.
                    with self._lock:
                        self._compiling.pop(grammar, None)
            return compiled

    def _renew(self, grammar: Grammar) -> "LLMatcher":
        """Compiled anew: copies share the automaton's states, which another answer may have used up."""
        with self._lock:
            self._compiled.pop(grammar, None)
        return self._compile(grammar)

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        library, tokenizer = _import_llguidance(), self._open_tokenizer()
        try:
            compiled: LLMatcher = library.LLMatcher(
                tokenizer, _source(library, grammar), log_level=0, limits=library.LLParserLimits(**_LIMITS)
            )
        except ValueError as error:
            raise GrammarError(f"response_format cannot be compiled: {_one_line(str(error))}") from None
        if not compiled.is_error():
            # What goes too far with the first token is found here, and not in a pass that others wait for.
            compiled.compute_bitmask()
        if compiled.is_error():
            raise GrammarError(f"response_format cannot be compiled: {_reason(compiled.get_error())}")
        return compiled

    def _open_tokenizer(self) -> "LLTokenizer":
        """Made once: it takes a second or two for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                vocabulary = Vocabulary(self._codec, vocab_size=self._vocab_size, end_ids=self._end_ids)
                ends: dict[str, Any] = {"eos_token": sorted(self._end_ids)} if self._end_ids else {}
                self._tokenizer = _import_llguidance().LLTokenizer(vocabulary, **ends)
            return self._tokenizer


def _source(library: Any, grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    make = library.LLMatcher
    if grammar.kind == "json_schema":
        source: str = make.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
    elif grammar.kind == "regex":
        source = make.grammar_from_regex(grammar.text)
    else:
        source = make.grammar_from_lark(grammar.text)
    return source


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            f"response_format needs llguidance, which cannot be imported ({error}): pip install "
            "'quasar-verifier[structured]'"
        ) from None
    return llguidance


def _reason(error: str) -> str:
    # What a reference that leads back to itself comes to.
    return "it generates no text" if "NoExtension" in error else _one_line(error)


def _one_line(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
