"""Who leaves and who comes: the order of each policy, the look-ahead windows, forks, ghosts, hints."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from kvdaemon.placement.anticipating import Anticipating
from kvdaemon.placement.lru import FirstInFirstOut, LeastRecentlyUsed, SchedulerAware
from kvdaemon.placement.placement import Fetch, Placement
from kvdaemon.placement.policies import POLICIES
from kvdaemon.placement.policy import Policy, Rank, TurnEnd
from kvdaemon.placement.runs import Tier


def path_of(word: str) -> list[bytes]:
    """Chunks of a context: each is named by all letters up to it."""
    return [word[: i + 1].encode() for i in range(len(word))]


class Store:
    """What a daemon does around a placement, without bytes. Clean: what is in DRAM may go."""

    def __init__(self, policy: Policy, dram: int = 100, ssd: int = 0) -> None:
        self.placement = Placement(policy, {"dram": dram, "ssd": ssd})

    def put(
        self, chain: Sequence[bytes], now_s: float, *tiers: Tier, partial: bool = False, unsaved: bool = False
    ) -> None:
        for tier in tiers or ("dram",):
            for i, chunk_id in enumerate(chain):
                if not self.placement.tree.holds(tier, chunk_id):
                    is_partial = partial and i == len(chain) - 1
                    parent_id = chain[i - 1] if i else b""
                    self.placement.added(tier, chunk_id, parent_id, now_s, is_partial=is_partial, unsaved=unsaved)

    def turn(
        self, word: str, now_s: float, *tiers: Tier, speaker: str = "person", partial: bytes = b"", took_s: float = 0.0
    ) -> None:
        """A turn with this context begins, and ends. partial: the name of a last chunk that is not full."""
        chain = [*path_of(word), *([partial] if partial else [])]
        self.turn_of(chain, now_s, *tiers, speaker=speaker, partial=bool(partial), took_s=took_s)

    def turn_of(
        self,
        chain: Sequence[bytes],
        now_s: float,
        *tiers: Tier,
        speaker: str = "person",
        partial: bool = False,
        took_s: float = 0.0,
    ) -> None:
        """A turn with any context, a truncated one for example."""
        self.placement.used(chain, now_s)
        self.put(chain, now_s + took_s, *tiers, partial=partial)
        self.placement.turn_ended(chain, len(chain) - partial, TurnEnd(speaker, 10), now_s + took_s)

    def evict(self, tier: Tier, now_s: float, *, unsaved_too: bool = False) -> str:
        victim = self.placement.next_victim(tier, now_s, unsaved_too=unsaved_too)
        if victim is None:
            return ""
        assert self.placement.next_victim(tier, now_s, unsaved_too=unsaved_too) == victim  # asking changes nothing
        self.placement.removed(tier, victim)
        return victim.decode()

    def evictions(self, tier: Tier, now_s: float) -> list[str]:
        """All that may go, in order."""
        gone = []
        while victim := self.evict(tier, now_s):
            gone.append(victim)
        return gone

    def fetch(self, free_slots: int, now_s: float) -> Fetch | None:
        fetch = self.placement.next_fetch(free_slots, now_s)
        if fetch is not None:
            if fetch.victim is not None:
                self.placement.removed("dram", fetch.victim)
            self.placement.added("dram", fetch.chunk_id, b"", now_s)
        return fetch


# -- orders ---------------------------------------------------------------------------------------------------------


def test_lru_takes_the_tail_of_who_was_used_longest_ago() -> None:
    """Chunks go from the end of a conversation, so that what is left of it still hits."""
    store = Store(LeastRecentlyUsed())
    store.turn("abc", 1.0)
    store.turn("xy", 2.0)
    assert store.evictions("dram", 3.0) == ["abc", "ab", "a", "xy", "x"]


def test_a_use_makes_it_the_last_to_go_but_not_with_fifo() -> None:
    for policy, order in ((LeastRecentlyUsed(), ["xy", "x", "ab", "a"]), (FirstInFirstOut(), ["ab", "a", "xy", "x"])):
        store = Store(policy)
        store.turn("ab", 1.0)
        store.turn("xy", 2.0)
        store.turn("ab", 3.0)
        assert store.evictions("dram", 4.0) == order


def test_shared_beginnings_go_after_all_that_continue_them() -> None:
    store = Store(LeastRecentlyUsed())
    store.turn("sab", 1.0)
    store.turn("sxy", 2.0)
    assert store.evictions("dram", 3.0) == ["sab", "sa", "sxy", "sx", "s"]


@pytest.mark.parametrize("policy", POLICIES)
def test_everything_goes_once_and_tails_first(policy: str) -> None:
    """Random conversations, some of whose chunks must stay: the rest goes, no chunk before what continues it."""
    random = Random(11)
    store = Store(POLICIES[policy](), dram=1000)
    for at in range(200):
        word = "".join(random.choice("abc") for _ in range(random.randint(1, 6)))
        store.turn(word, float(at), speaker=random.choice(["person", "tool"]))
    everything = set(store.placement.tree.nodes)
    held = set(random.sample(sorted(everything), 10))
    for chunk_id in held:
        store.placement.hold(chunk_id)
    stay = {c for c in everything if any(h.startswith(c) for h in held)}
    gone = store.evictions("dram", 300.0)
    assert sorted(gone) == sorted(c.decode() for c in everything - stay)
    place = {name: at for at, name in enumerate(gone)}
    assert all(place[name] < place[name[:-1]] for name in gone if name[:-1] in place)
    for chunk_id in held:
        store.placement.release(chunk_id)
    assert sorted(store.evictions("dram", 300.0)) == sorted(c.decode() for c in stay)
    assert len(store.placement.tree) == 0


def test_what_is_not_saved_goes_last_and_only_when_told() -> None:
    store = Store(LeastRecentlyUsed(), ssd=10)
    store.put(path_of("ab"), 1.0, unsaved=True)
    store.put(path_of("x"), 2.0)
    assert store.evict("dram", 3.0) == "x"
    assert store.evict("dram", 3.0) == ""
    store.placement.saved(b"ab")
    assert store.evict("dram", 3.0) == "ab"
    assert store.evict("dram", 3.0) == ""
    assert store.evict("dram", 3.0, unsaved_too=True) == "a"


def test_held_as_often_as_released() -> None:
    store = Store(LeastRecentlyUsed())
    store.put(path_of("a"), 1.0)
    store.placement.hold(b"a")
    store.placement.hold(b"a")
    store.placement.release(b"a")
    assert store.evict("dram", 2.0) == ""
    store.placement.release(b"a")
    assert store.evict("dram", 2.0) == "a"


# -- partial chunks --------------------------------------------------------------------------------------------------


def test_a_partial_chunk_goes_first_once_a_longer_one_took_its_place() -> None:
    store = Store(LeastRecentlyUsed())
    store.turn("old", 0.0)
    store.turn("a", 1.0, partial=b"a.")
    store.turn("ab", 2.0, partial=b"ab.")
    assert store.evictions("dram", 3.0) == ["a.", "old", "ol", "o", "ab.", "ab", "a"]


def test_nothing_continues_a_partial_chunk() -> None:
    """A chain that names one as its parent begins anew."""
    store = Store(LeastRecentlyUsed())
    store.turn("a", 1.0, partial=b"a.")
    store.placement.added("dram", b"z", b"a.", 2.0)
    assert sorted(store.evictions("dram", 3.0)) == ["a", "a.", "z"]


# -- truncated contexts ----------------------------------------------------------------------------------------------


def without(word: str, start: int, end: int) -> list[bytes]:
    """The context of a word that dropped the chunks start..end-1."""
    return [*path_of(word)[:start], *path_of(word)[end:]]


@pytest.mark.parametrize("start", [0, 1])
def test_what_a_truncation_dropped_does_not_stay_for_what_is_left(start: int) -> None:
    """It goes in its turn, and what goes on stays whole: nothing resident needs it any more."""
    store = Store(LeastRecentlyUsed())
    store.turn("sddkk", 1.0)
    store.turn("old", 2.0)
    store.turn_of(without("sddkkn", start, 3), 3.0)
    dropped = path_of("sdd")[start:]
    left = [*path_of("s")[:start], b"sddk", b"sddkk", b"sddkkn"]
    store.turn_of(left, 4.0)
    gone = store.evictions("dram", 5.0)
    assert gone == [c.decode() for c in (*path_of("old")[::-1], *dropped[::-1], *left[::-1])]


def test_until_a_turn_has_ended_without_it_all_stays() -> None:
    """One that is cancelled leaves the context as it was."""
    store = Store(LeastRecentlyUsed())
    store.turn("sddkk", 1.0)
    store.placement.used(without("sddkk", 1, 3), 2.0)
    assert store.evictions("dram", 3.0) == ["sddkk", "sddk", "sdd", "sd", "s"]


def test_a_branch_keeps_what_another_has_dropped() -> None:
    """From within what was dropped, and from behind it: whoever goes on there has it before the rest again."""
    store = Store(LeastRecentlyUsed())
    store.turn("sddkk", 1.0)
    store.turn("sdx", 2.0)
    store.turn_of(without("sddkkn", 1, 3), 3.0)
    store.turn("old", 4.0)
    store.turn("sddkx", 5.0)
    store.turn("sdxx", 6.0)
    gone = store.evictions("dram", 7.0)
    assert gone[:4] == ["sddkkn", "sddkk", "old", "ol"]
    assert gone.index("sddkx") < gone.index("sddk") < gone.index("sdd") < gone.index("sd")
    assert gone.index("sdxx") < gone.index("sdx") < gone.index("sd")


def test_several_truncations_in_a_row_and_a_partial_chunk() -> None:
    store = Store(LeastRecentlyUsed())
    store.turn("saabb", 1.0, partial=b"p")
    store.turn_of([*without("saabbcc", 1, 3), b"q"], 2.0, partial=True)
    store.turn_of([*without("saabbccd", 1, 5), b"r"], 3.0, partial=True)
    store.turn("old", 4.0)
    left = without("saabbccd", 1, 5)
    store.turn_of(left, 5.0)
    gone = store.evictions("dram", 6.0)
    assert sorted(gone[:3]) == ["p", "q", "r"]
    assert gone[3:10] == ["saa", "sa", "saabb", "saab", "old", "ol", "o"]
    assert gone[10:] == [c.decode() for c in left[::-1]]


def test_a_turn_that_waits_keeps_what_it_needs_though_another_drops_it() -> None:
    store = Store(SchedulerAware())
    store.turn("sddkk", 1.0)
    store.placement.wait(7, path_of("sddk"))
    store.turn_of(without("sddkkn", 1, 3), 2.0)
    store.turn("old", 3.0)
    gone = store.evictions("dram", 4.0)
    assert gone[:3] == ["old", "ol", "o"]
    assert {"sdd", "sd"} < set(gone[3:])
    store.turn("sddkk", 1.0)
    store.placement.wait(8, path_of("sddk"))
    store.turn_of(without("sddkkn", 1, 3), 2.0)
    store.turn("old", 3.0)
    store.placement.go(8)
    store.placement.go(7)
    assert store.evictions("dram", 4.0)[:2] == ["sdd", "sd"]


def test_what_a_truncation_left_behind_ranks_as_what_a_fork_left() -> None:
    policy = Listener()
    store = Store(policy)
    store.turn("sddkk", 1.0)
    store.turn_of(without("sddkkn", 1, 3), 5.0)
    store.turn_of(without("sddkknn", 1, 3), 9.0)
    assert [what for what in policy.told if what[0] == "forked"] == [("forked", 1)]
    assert policy.told[-1] == ("ended", (3, 5, 1, 4.0))


def test_after_a_restart_chunks_come_as_they_were_saved() -> None:
    """Each behind what it was computed behind; the next turn of the conversation says what is left of that."""
    store = Store(LeastRecentlyUsed())
    saved = path_of("sddkkn")
    for i, chunk_id in enumerate(saved):
        store.placement.added("dram", chunk_id, saved[i - 1] if i else b"", 0.0)
    store.turn_of(without("sddkkn", 1, 3), 1.0)
    store.turn_of(without("sddkkn", 1, 3), 2.0)
    assert store.evictions("dram", 3.0)[:2] == ["sdd", "sd"]


def test_a_context_that_nobody_can_have_changes_nothing_for_good() -> None:
    """Chunks in an order that goes round in a circle, or twice: all can still go, each once."""
    for chain in (b"c b a", b"b c a b", b"a c b", b"c c a", b"b a b a"):
        store = Store(LeastRecentlyUsed())
        for i, chunk_id in enumerate((b"a", b"b", b"c")):
            store.placement.added("dram", chunk_id, b" ab"[i : i + 1], 0.0)
        store.placement.turn_ended(chain.split(), 3, TurnEnd(), 1.0)
        assert sorted(store.evictions("dram", 2.0)) == ["a", "b", "c"]


# -- windows ---------------------------------------------------------------------------------------------------------


def test_waiting_turns_go_last_and_the_last_of_them_first() -> None:
    """Section 3.3.2: first who has no job, then from the window's tail."""
    store = Store(SchedulerAware())
    for at, word in enumerate(["ab", "cd", "ef"]):
        store.turn(word, float(at))
    store.placement.wait(7, path_of("ab"))
    store.placement.wait(9, path_of("cd"))
    assert store.evictions("dram", 5.0) == ["ef", "e", "cd", "c", "ab", "a"]


def test_lru_does_not_look_at_the_queue() -> None:
    store = Store(LeastRecentlyUsed(), ssd=100)
    store.turn("ab", 0.0, "ssd")
    store.turn("cd", 1.0, "dram", "ssd")
    store.placement.wait(1, path_of("ab"))
    assert store.placement.next_fetch(10, 2.0) is None
    assert store.evictions("ssd", 2.0) == ["ab", "a", "cd", "c"]


def test_who_waits_no_longer_is_one_of_the_others_again() -> None:
    store = Store(SchedulerAware())
    store.turn("ab", 0.0)
    store.turn("cd", 1.0)
    store.placement.wait(1, path_of("ab"))
    assert store.placement.next_victim("dram", 2.0) == b"cd"
    store.placement.go(1)
    assert store.placement.next_victim("dram", 2.0) == b"ab"


def test_two_turns_that_share_a_beginning() -> None:
    """It belongs to the earlier one, until that one runs."""
    store = Store(SchedulerAware())
    store.turn("sa", 0.0)
    store.turn("sb", 0.0)
    store.turn("xy", 0.0)
    for ticket, word in ((1, "sa"), (2, "xy"), (3, "sb")):
        store.placement.wait(ticket, path_of(word))
    store.placement.go(1)
    assert store.evictions("dram", 5.0) == ["sa", "sb", "s", "xy", "x"]


def test_the_eviction_window_is_of_the_papers_size() -> None:
    """(C_mem + C_disk) / S_kv turns; who waits behind it is one of the others."""
    store = Store(SchedulerAware(), dram=2, ssd=4)
    for at in range(10):
        store.turn(f"{at}x", float(at), "ssd")
    assert store.placement.session_chunks == 2
    assert (store.placement.prefetch_window, store.placement.eviction_window) == (1, 3)
    for ticket in range(10):
        store.placement.wait(ticket, path_of(f"{9 - ticket}x"))  # who was used last waits first
    gone = store.evictions("ssd", 20.0)
    assert gone[:14:2] == [f"{at}x" for at in range(7)]  # the seven behind the window, by LRU
    assert gone[14::2] == ["7x", "8x", "9x"]  # then the window, from its tail


def test_turns_with_nothing_stored_take_no_place_in_the_window() -> None:
    store = Store(SchedulerAware(), dram=2, ssd=2)
    store.turn("ab", 0.0, "ssd")
    store.turn("cd", 1.0, "ssd")
    assert store.placement.eviction_window == 2
    for ticket in range(10):
        store.placement.wait(ticket, path_of(f"{ticket}?"))
    store.placement.wait(10, path_of("ab"))
    assert store.evictions("ssd", 2.0) == ["cd", "c", "ab", "a"]


def test_the_window_moves_on_as_turns_go() -> None:
    store = Store(SchedulerAware(), dram=1, ssd=1)
    for at, word in enumerate(["ab", "cd", "ef"]):
        store.turn(word, float(at), "ssd")
    assert store.placement.eviction_window == 1
    for ticket, word in enumerate(["ef", "ab", "cd"]):
        store.placement.wait(ticket, path_of(word))
    assert store.placement.next_victim("ssd", 5.0) == b"ab"
    store.placement.go(0)
    assert store.placement.next_victim("ssd", 5.0) == b"cd"


# -- prefetching -----------------------------------------------------------------------------------------------------


def test_prefetch_for_the_head_first_and_in_order() -> None:
    store = Store(SchedulerAware(), dram=20, ssd=20)
    store.turn("abc", 0.0, "ssd")
    store.turn("xy", 0.0, "ssd")
    store.put(path_of("a"), 0.0)
    store.placement.wait(2, path_of("xy"))
    store.placement.wait(1, path_of("abc"))
    found = [store.fetch(10, 1.0) for _ in range(5)]
    assert found == [Fetch(b"ab"), Fetch(b"abc"), Fetch(b"x"), Fetch(b"xy"), None]


def test_prefetch_takes_from_nobody_who_is_nearer_to_the_head() -> None:
    """First from who does not wait, then from the last of the queue; never from a turn for one behind it."""
    store = Store(SchedulerAware(), dram=20, ssd=20)
    for word in ("ab", "cd", "ef"):
        store.turn(word, 0.0, "ssd")
    store.put(path_of("ab"), 0.0)
    store.put(path_of("ef"), 0.0)
    store.put(path_of("u"), 0.0)
    for ticket, word in enumerate(["ab", "cd", "ef"]):
        store.placement.wait(ticket, path_of(word))
    found = [store.fetch(0, 1.0) for _ in range(3)]
    assert found == [Fetch(b"c", b"u"), Fetch(b"cd", b"ef"), None]  # ef has e left, and gives it for nothing behind it


def test_prefetch_stops_where_no_more_fits() -> None:
    """What waits further back would be pushed out again before its turn comes."""
    store = Store(SchedulerAware(), dram=8, ssd=100)
    words = ["abc", "def", "ghi"]
    for word in words:
        store.turn(word, 0.0, "ssd")
        store.placement.wait(words.index(word), path_of(word))
    found = [store.fetch(8, 1.0) for _ in range(7)]
    assert [fetch and fetch.chunk_id for fetch in found] == [b"a", b"ab", b"abc", b"d", b"de", b"def", None]


def test_prefetch_does_not_begin_behind_a_hole() -> None:
    """A chunk is of use only with all before it."""
    store = Store(SchedulerAware(), dram=20, ssd=20)
    store.turn("abc", 0.0, "ssd")
    store.placement.removed("ssd", b"abc")
    store.placement.removed("ssd", b"ab")
    store.placement.wait(1, path_of("abc"))
    assert [store.fetch(5, 1.0), store.fetch(5, 1.0)] == [Fetch(b"a"), None]


# -- what a policy is told -------------------------------------------------------------------------------------------


class Listener(LeastRecentlyUsed):
    """LRU that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []
        self._profiles = 0

    def turn_ended(self, end: TurnEnd, now_s: float) -> Rank:
        self._profiles += 1
        self.told.append(("ended", (end.answers, end.chunks, end.new_chunks, end.gap_s)))
        return Rank(self._profiles)

    def turn_returned(self, profile: object, now_s: float, *, partial_hit: bool | None) -> None:
        self.told.append(("returned", (profile, partial_hit)))

    def turn_forked(self, profile: object, now_s: float) -> Rank:
        self.told.append(("forked", profile))
        return Rank(profile)


def test_a_conversation_from_turn_to_turn() -> None:
    policy = Listener()
    store = Store(policy)
    store.turn("ab", 1.0, partial=b"ab.")
    store.turn("abc", 11.0, partial=b"abc.", took_s=2.0)
    assert policy.told == [
        ("ended", (1, 3, 3, None)),
        ("returned", (1, False)),
        ("ended", (2, 4, 2, 10.0)),
    ]


def test_a_conversation_is_back_when_its_turn_begins_to_wait() -> None:
    """However long the queue: how long it waits says nothing of when the next one comes."""
    policy = Listener()
    store = Store(policy)
    store.turn("ab", 1.0)
    store.placement.wait(7, path_of("ab"), 21.0)
    assert policy.told[1:] == [("returned", (1, None))]
    store.placement.go(7)
    store.turn("abc", 5000.0)
    assert policy.told[2:] == [("ended", (2, 3, 1, 20.0))]


def test_a_partial_chunk_that_is_asked_for() -> None:
    policy = Listener()
    store = Store(policy)
    store.turn("ab", 1.0, partial=b"ab.")
    store.placement.used([*path_of("ab"), b"ab."], 5.0)
    assert policy.told[-1] == ("returned", (1, True))


def test_a_conversation_is_known_after_its_last_chunk_went() -> None:
    """What it was like is remembered longer than its KV."""
    policy = Listener()
    store = Store(policy)
    store.turn("ab", 1.0)
    assert store.evictions("dram", 2.0) == ["ab", "a"]
    assert len(store.placement.tree) == 0
    store.turn("abc", 21.0)
    assert policy.told[1:] == [("returned", (1, None)), ("ended", (2, 3, 1, 20.0))]


def test_ghosts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdaemon.placement.placement._GHOSTS", 10)
    store = Store(Listener())
    for at in range(100):
        store.turn(chr(1000 + at), float(at))
        store.evictions("dram", float(at))
    assert len(store.placement._ghosts) == 10


def test_another_turn_that_leaves_early_is_a_fork() -> None:
    """With less than half of the context it is another conversation; with more, the same one that went back."""
    policy = Listener()
    store = Store(policy)
    store.turn("abcdef", 1.0)
    store.turn("abxy", 5.0)
    assert policy.told[1:] == [("forked", 1), ("ended", (1, 4, 2, None))]
    policy.told.clear()
    store.turn("abxzz", 9.0)  # three of four chunks
    assert policy.told == [("returned", (2, None)), ("forked", 2), ("ended", (2, 5, 2, 4.0))]


# -- anticipating ----------------------------------------------------------------------------------------------------


def taught() -> Store:
    """Tools answer after 2 s. People take a minute, and every second one never comes back."""
    store = Store(Anticipating(), dram=10_000)
    now_s = 0.0
    for number in range(400):
        now_s += 100.0
        tool, person = (chr(0x1000 + 2 * number + i) for i in range(2))
        store.turn(tool, now_s, speaker="tool")
        store.turn(f"{tool}t", now_s + 2.0, speaker="")
        store.turn(person, now_s + 3.0, speaker="person")
        if number % 2:
            store.turn(f"{person}p", now_s + 63.0, speaker="")
    store.evictions("dram", now_s + 1e6)
    return store


def test_who_is_about_to_return_outlives_who_was_used_later() -> None:
    """Learned, not told: a tool is worth most at once, and nothing soon after; a person is not due for a while."""
    for after_s, victim in ((0.5, b"person"), (15.0, b"tool")):
        store = taught()
        store.turn("person", 1e7, speaker="person")
        store.turn("tool", 1e7 + 40.0, speaker="tool")
        assert store.placement.next_victim("dram", 1e7 + 40.0 + after_s) == victim


def test_who_is_expected_stays_until_well_after_that() -> None:
    """Somebody's word counts for more than what was learned, and is forgotten when they do not come."""
    for asked_s, victim in ((101.0, b"cd"), (160.0, b"cd"), (200.0, b"ab")):
        store = Store(Anticipating())
        store.turn("ab", 0.0)
        store.turn("cd", 50.0)
        assert store.placement.next_victim("dram", 100.0) == b"ab"
        store.placement.expected(path_of("ab"), 110.0)
        assert store.placement.next_victim("dram", asked_s) == victim


def test_who_is_expected_later_goes_earlier() -> None:
    store = Store(Anticipating())
    for word, in_s in (("ab", 500.0), ("cd", 20.0), ("ef", 100.0)):
        store.turn(word, 0.0)
        store.placement.expected(path_of(word), in_s)
    assert store.evictions("dram", 1.0)[::2] == ["ab", "ef", "cd"]


def test_the_next_turn_ends_an_expectation() -> None:
    store = Store(Anticipating())
    store.turn("ab", 0.0)
    store.placement.expected(path_of("ab"), 1000.0)
    store.turn("ab", 5.0)
    store.turn("cd", 50.0)
    assert store.placement.next_victim("dram", 51.0) == b"ab"


def test_anticipating_looks_ahead_too() -> None:
    store = Store(Anticipating(), dram=20, ssd=20)
    store.turn("ab", 0.0, "dram", "ssd")
    store.turn("cd", 50.0, "dram", "ssd")
    store.placement.wait(1, path_of("ab"))
    assert store.placement.next_victim("dram", 60.0) == b"cd"


def test_a_token_behind_a_long_context_is_worth_more() -> None:
    """It takes longer to compute again."""
    store = Store(Anticipating(attention_chunks=4.0))
    store.turn("abcdefghijklmnop", 0.0)
    store.turn("x", 1.0)
    assert store.placement.next_victim("dram", 2.0) == b"x"


def test_entries_of_the_past_are_dropped() -> None:
    """However often conversations go on, an order holds about one entry per conversation."""
    store = Store(Anticipating())
    for at in range(5000):
        store.turn("abcde"[: 1 + at % 5], at / 10)
        store.placement.expected(path_of("a"), at / 10 + 5)
    order = store.placement._between["dram"]
    assert sum(map(len, order._buckets.values())) + len(order._latest) + len(order._overdue) < 3000  # type: ignore[attr-defined]
