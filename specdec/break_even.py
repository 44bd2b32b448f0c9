"""BreakEven: whether drafting pays at all, and when to try it again.

Costs and tokens of the drafted rounds are weighed against plain decoding, the latest rounds most.
Whoever tells of them counts both half as they came and half as they were expected: single rounds,
and on a busy machine their times, vary too much to go by what came alone, and a draft that is too
sure of itself, or a cost that is not known yet, to go by the rest. While drafting does not pay,
plain decoding goes on and drafting is tried again after 8, 16, 32, ... rounds, 64 at most.

The guarantee: what drafted rounds took beyond plain decoding of the same tokens, catching up
included, is added up. No round drafts that would bring it above `CREDIT` plain rounds + `SHARE` of
all the time since the text began; unless `SHARE` of the plain rounds since the last drafted one, in
this text and those before, pays for it.
"""

FORGET = 0.8  # of the evidence, per drafted round
FADE = 0.97  # of the evidence, per plain round
PRIOR = 8.0  # plain rounds that the prior evidence took
HOPE = 1.2  # prior tokens per plain token: drafting is tried first
MARGIN = 0.03  # drafting goes on while it is expected to lose less
FIRST_WAIT, LAST_WAIT = 8, 64  # plain rounds before the next try
CREDIT, SHARE = 4.0, 0.03  # a quarter of the credit where earlier texts lost
SESSION = 0.98  # memory of earlier texts, per drafted round


class BreakEven:
    """The account of one text after the other."""

    def __init__(self) -> None:
        self._session_tokens, self._session_cost = 5 * PRIOR * HOPE, 5 * PRIOR
        self._since = 0  # plain rounds since the last drafted one, over all texts
        self._next_wait = FIRST_WAIT
        self.begin()

    def begin(self) -> None:
        """A new text: what the texts before said counts, but not for much."""
        before = min(HOPE, self._session_tokens / self._session_cost)
        # Of drafted rounds: how many, their tokens, and what they took in plain rounds.
        self._rounds, self._tokens, self._cost = PRIOR / 2, before * PRIOR, PRIOR
        self._loss = self._spent = 0.0  # in plain rounds
        self._wait, self._credit = 0, CREDIT
        if self.advantage < 1 - MARGIN:
            self._credit = CREDIT / 4
            self._wait = self._next_wait // 4
            self._next_wait = max(FIRST_WAIT, self._next_wait // 2)
        else:
            self._next_wait = FIRST_WAIT

    @property
    def advantage(self) -> float:
        """Tokens of drafted rounds per token that plain decoding makes in their time."""
        return self._tokens / self._cost

    @property
    def pausing(self) -> bool:
        """Whether drafting does not pay for now."""
        return self._wait > 0

    @property
    def loss(self) -> float:
        """Plain rounds that drafting has lost in this text so far, negative for a gain."""
        return self._loss

    @property
    def round_tokens(self) -> float:
        """Tokens of a drafted round."""
        return self._tokens / self._rounds

    @property
    def round_cost(self) -> float:
        """Cost of a drafted round, in plain rounds."""
        return self._cost / self._rounds

    def pays(self, risk: float) -> bool:
        """Whether the next round should draft; it may lose `risk` plain rounds."""
        if self._wait > 0:
            self._wait -= 1
            return False
        return self.allows(risk)

    def allows(self, risk: float, later: int = 0) -> bool:
        """Whether drafting may lose `risk` plain rounds, after as many as `later` from now."""
        allowed = self._credit + SHARE * (self._spent + later)
        return self._loss + risk <= allowed or risk <= SHARE * (self._since + later)

    def drafted(self, cost: float, tokens: float) -> None:
        """A drafted round took `cost` plain rounds and brought so many tokens."""
        self._rounds = FORGET * self._rounds + 1
        self._tokens = FORGET * self._tokens + tokens
        self._cost = FORGET * self._cost + cost
        self._session_tokens = SESSION * self._session_tokens + tokens
        self._session_cost = SESSION * self._session_cost + cost
        self._since = 0
        self._loss += cost - tokens
        self._spent += cost
        if self.advantage < 1 - MARGIN:
            self._wait, self._next_wait = self._next_wait, min(2 * self._next_wait, LAST_WAIT)
        else:
            self._next_wait = FIRST_WAIT

    def plain(self, extra: float = 0.0) -> None:
        """A round of plain decoding; `extra`: what it took beyond plain decoding that goes on
        alone, in plain rounds."""
        self._rounds *= FADE
        self._tokens *= FADE
        self._cost *= FADE
        self._since += 1
        self._loss += extra
        self._spent += 1 + extra
