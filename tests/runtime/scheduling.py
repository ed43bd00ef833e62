"""Requests over a session without a model, for tests of the scheduler: what follows depends on the whole context."""

import threading

import numpy as np

from engines.probes.row_invariance import RowInvariance
from runtime.active_request import UNREAD, ActiveRequest
from runtime.control.control import NoControl
from runtime.control.fixed import FixedControl
from runtime.drafters import PromptLookup
from runtime.kv_cache import KVCache
from runtime.loop import Decoding
from runtime.sampling.chooser import GreedyChooser
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence
from runtime.stopping import StopRules
from runtime.testing import TableSession, run_loop
from runtime.verifier import Verifier

EXACT = RowInvariance(chain=1, widest=32, tree=True, prefill=True, batch=True)
KINDS = 7


def next_token(context):
    """One of a few tokens, so that drafts are right now and then; another one where any earlier token differs."""
    state = 0
    for token in context:
        state = (state * 31 + token + 1) % 10007
    return state % KINDS


def answer_alone(prompt, count):
    """What plain decoding gives."""
    rounds = run_loop(TableSession(next_token), prompt, max_new_tokens=count)
    return [token for one in rounds for token in one.tokens]


class Service:
    """A scheduler over a table session with so many slots."""

    def __init__(self, slots=3, exact=EXACT, session=None, **options):
        self.session = session or TableSession(next_token, slots=slots)
        self.verifier, self.exact = Verifier(self.session), exact
        self.scheduler = Scheduler(self.verifier, exact=exact, **options)

    def new(self, salt=None):
        return self.scheduler.add(KVCache(self.session.contract), salt=salt)

    def hold_passes(self):
        """Passes wait until the second event is set, 20 seconds at most; the first is set when one has begun."""
        entered, leave = threading.Event(), threading.Event()
        run = self.session.run_batch

        def held(batch, **options):
            entered.set()
            leave.wait(20)
            return run(batch, **options)

        self.session.run_batch = held
        return entered, leave

    def start(
        self,
        prompt,
        count,
        *,
        drafts=0,
        drafter=None,
        priority=0,
        salt=None,
        interrupted=lambda: None,
        most_unread=UNREAD,
        chooser=None,
    ):
        """Submit a request; `stream` reads its steps."""
        scheduled = self.new(salt)
        self.scheduler.begin(scheduled)
        sequence = Sequence(
            np.asarray(prompt, np.int64),
            self.session.contract,
            cache=scheduled.cache,
            chooser=chooser or GreedyChooser(),
            stop=StopRules(max_new_tokens=count),
            exact=self.exact,
        )
        control = FixedControl(drafter or PromptLookup(), drafts, trees=True) if drafts else NoControl()
        request = ActiveRequest(
            Decoding(sequence, self.verifier, control, interrupted),
            scheduled,
            priority=priority,
            most_unread=most_unread,
        )
        try:
            self.scheduler.submit(request)
        except BaseException:
            self.scheduler.release(scheduled)
            raise
        return request

    def stream(self, request):
        """The steps of a request, which is withdrawn at the end."""
        try:
            ended = False
            while not ended:
                step = self.scheduler.take(request)
                ended = step.round.finish_reason is not None
                yield step
        finally:
            self.finish(request)

    def finish(self, request):
        self.scheduler.withdraw(request)
        self.scheduler.end(request.scheduled)
        self.scheduler.release(request.scheduled)

    def answer(self, prompt, count, **options):
        """The tokens of a request."""
        return [token for step in self.stream(self.start(prompt, count, **options)) for token in step.round.tokens]
