"""What the page cache shares, what it does not, and in which order it gives up what nobody has."""

from __future__ import annotations

from server.engine.page_cache import CachedPages, PageCache
from server.engine.pages import PagePool
from server.engine.scheduler import Schedule
from server.engine.sequence import Sequence
from tests.engine.world import Arrival, Stack, World, make_world, own_text, scheduled

TEMPLATE = own_text(0, 10)


def _start(world: World, *sequences: Sequence) -> Schedule:
    for sequence in sequences:
        world.scheduler.add(sequence)
    return world.step()


def _finish(world: World, sequence: Sequence, tokens: tuple[int, ...] = ()) -> None:
    """Let a running sequence generate `tokens`, the last of them its end."""
    for token in tokens[:-1]:
        sequence.output.append(token)
        world.step()
    sequence.output += tokens[-1:]
    world.scheduler.remove(sequence)
    world.check_ownership()


def _run_alone(world: World, sequence: Sequence) -> None:
    """From its start to its first token, which is its last."""
    _start(world, sequence)
    _finish(world, sequence, (7,))


def _sequence(name: str, text: tuple[int, ...], stack: tuple[int, ...] = (), *, scored: bool = False) -> Sequence:
    return Arrival(0, text, 20, Stack(stack), scored_from=0 if scored else None).sequence(name)


def _computed(schedule: Schedule) -> dict[str, int]:
    return {run.id: sum(row.count for row in schedule.rows[run]) for run in scheduled(schedule)}


def test_sequences_that_come_at_once_share_their_template_in_the_step_that_computes_it() -> None:
    world = make_world(100, 4, 64, 500)
    many = [_sequence(str(index), (*TEMPLATE, index)) for index in range(64)]
    schedule = _start(world, *many)
    assert _computed(schedule) == {"0": 11} | {str(index): 3 for index in range(1, 64)}
    assert world.scheduler.pages.used == 2 + 64
    assert (schedule.num_prompt_tokens, schedule.num_cached_tokens) == (64 * 11, 63 * 8)


def test_the_last_position_is_always_computed() -> None:
    for page_size in (1, 2, 5, 10, 16):
        world = make_world(100, page_size, 4, 50)
        _start(world, first := _sequence("first", TEMPLATE))
        _finish(world, first)
        second = _sequence("second", TEMPLATE)
        schedule = _start(world, second)
        cached = 9 // page_size * page_size
        assert _computed(schedule) == {"second": 10 - cached}
        assert second.num_cached == cached


def test_a_chats_next_turn_finds_the_last_ones_answer() -> None:
    world = make_world(30, 4, 4, 50)
    _start(world, turn := _sequence("turn", TEMPLATE))
    _finish(world, turn, (7, 8, 9, 7, 8, 9, 7))  # the last one's keys and values are never computed
    following = _sequence("next", (*TEMPLATE, 7, 8, 9, 7, 8, 9, 7, 5, 5, 5))
    assert _computed(_start(world, following)) == {"next": 4}


def test_stacks_share_no_text() -> None:
    world = make_world(60, 4, 8, 100)
    schedule = _start(world, *(_sequence(str(stack), TEMPLATE, stack) for stack in ((), (3,), (-3,), (3, 4))))
    assert schedule.num_cached_tokens == 0
    assert set(_computed(schedule).values()) == {10}


def test_the_page_that_virtual_tokens_and_text_share_is_found_too_and_then_not_copied() -> None:
    world = make_world(60, 4, 8, 100)
    schedule = _start(world, *(_sequence(str(index), (*TEMPLATE, index), (6,)) for index in range(8)))
    assert len(schedule.page_copies) == 1
    assert set(_computed(schedule).values()) == {11, 1}
    assert world.scheduler.pages.used == 2 + 3 + 8  # the prefix's; three of text, the first of them with its tail


def test_a_prompt_that_is_scored_takes_nothing_and_leaves_its_pages() -> None:
    world = make_world(60, 4, 8, 100)
    schedule = _start(world, *(_sequence(str(index), TEMPLATE, scored=index < 2) for index in range(3)))
    assert _computed(schedule) == {"0": 10, "1": 10, "2": 2}
    assert world.scheduler.pages.used == 3 + 3 + 1
    for sequence in scheduled(schedule):
        sequence.output.append(5)
    world.step()  # the second one's are exchanged for the first one's
    assert world.scheduler.pages.used == 3 + 1 + 1


def test_a_preempted_sequence_finds_its_pages_again_and_counts_them_once() -> None:
    world = make_world(8, 4, 4, 50)  # 7 pages
    first, second = _sequence("first", own_text(1, 11)), _sequence("second", own_text(2, 15))
    _start(world, first, second)
    for token in range(2):
        first.output.append(token)
        second.output.append(token)
        schedule = world.step()
    assert schedule.num_preempted == 1
    assert world.scheduler.running == [first]
    _finish(world, first)
    schedule = world.step()
    assert _computed(schedule) == {"second": 5}  # of 17: the page that was taken from it, and the rest
    assert schedule.num_prompt_tokens == 0
    assert second.num_cached == 0


def test_without_a_prompt_nothing_is_taken_and_nothing_left() -> None:
    """Its last virtual token is run again, in a page that another's text does not follow."""
    world = make_world(60, 4, 8, 100)
    _start(world, text := _sequence("text", TEMPLATE, (4,)))
    _finish(world, text)
    nodes = world.nodes()
    resumed = _sequence("none", (), (4,))
    resumed.output += TEMPLATE
    assert _computed(_start(world, resumed)) == {"none": 11}
    assert world.nodes() == nodes


def test_what_a_row_would_have_filled_is_not_cached_when_its_sequence_is_preempted_in_that_step() -> None:
    world = make_world(4, 4, 4, 50)  # 3 pages
    first, second = _sequence("first", own_text(1, 7)), _sequence("second", own_text(2, 3))
    _start(world, first, second)
    first.output += [5, 5]  # not a stream, so it comes after the second, and it needs a third page
    second.output += [5]  # fills its page
    schedule = world.step()
    assert schedule.num_preempted == 1
    assert _computed(schedule) == {"first": 2}
    assert sum(len(node.pages) for node in world.nodes()) == 2


def test_a_sequence_that_fails_leaves_nothing_but_what_others_need() -> None:
    world = make_world(60, 4, 8, 100)
    kept = _sequence("kept", (*TEMPLATE[:4], 1))
    failing, other = (_sequence(name, (*TEMPLATE, 1)) for name in ("failing", "other"))
    _start(world, kept, failing, other)
    world.scheduler.remove(failing, keep=False)
    assert len(world.nodes()) == 1 + 2  # the other refers to both pages
    world.scheduler.remove(other, keep=False)
    assert len(world.nodes()) == 1 + 1
    world.scheduler.remove(kept)
    assert (world.scheduler.cache.num_idle, world.scheduler.pages.used) == (1, 1)


def test_a_stack_whose_text_fills_no_page_leaves_no_node() -> None:
    world = make_world(60, 16, 8, 100)
    for index in range(5):
        _start(world, sequence := _sequence(str(index), TEMPLATE, (-(index + 1),) if index % 2 else ()))
        _finish(world, sequence)
    assert [len(node.pages) for node in world.nodes()] == [1, 1]  # the virtual tokens'


def test_idle_prefixes_are_reclaimed_least_recently_used_first() -> None:
    world = make_world(7, 4, 1, 40)  # 6 pages
    for name, stack in (("a", (8,)), ("b", (4,)), ("a2", (8,))):
        _start(world, sequence := _sequence(name, (1,), stack))
        _finish(world, sequence)
    _start(world, _sequence("c", own_text(3, 13)))  # four pages, three are free
    assert ("", "(8,)/0") in world.scheduler.cache.root.children
    assert ("", "(4,)/0") not in world.scheduler.cache.root.children


def test_the_least_recently_used_leaf_goes_first_and_no_page_before_those_behind_it() -> None:
    cache = PageCache(PagePool(8, 4))
    texts = {name: _add(cache, name) for name in ("abc", "abd", "xy")}  # a, b, c; d; x, y: six pages
    for name in ("abc", "xy", "abd"):
        for node in reversed(texts[name]):
            cache.release(node)
    for node in texts["xy"]:
        cache.hold(node)
    cache.prove(texts["xy"])
    for node in reversed(texts["xy"]):
        cache.release(node)
    assert cache.available == 7
    assert _gone(cache, "abcdxy") == ["", "c", "cd", "bcd", "abcd", "abcdy", "abcdxy"]


def test_what_was_asked_for_again_outlasts_what_came_once_and_virtual_tokens_do_from_the_start() -> None:
    world = make_world(17, 4, 1, 40)  # 16 pages
    chat = own_text(1, 9)
    _run_alone(world, _sequence("task", (1,), (4,)))  # a page of virtual tokens
    _run_alone(world, _sequence("turn", chat))
    _run_alone(world, _sequence("next turn", (*chat, 5)))  # asks for two pages again
    for index in range(20):
        _run_alone(world, _sequence(str(index), own_text(index + 2, 13)))  # a flood of texts, three pages each
    task = _sequence("task again", (2,), (4,))
    assert _computed(_start(world, task)) == {"task again": 1}
    assert task.num_cached_virtual == 4
    _finish(world, task)
    assert _computed(_start(world, _sequence("third turn", (*chat, 6)))) == {"third turn": 2}


def test_a_sequence_that_was_preempted_has_not_asked_again() -> None:
    world = make_world(9, 4, 2, 40)  # 8 pages
    first, second = (_sequence(str(index), own_text(index, 11)) for index in range(2))
    _start(world, first, second)
    while second in world.scheduler.running:
        for sequence in world.scheduler.running:
            sequence.output.append(7)
        world.step()
    _finish(world, first, (7,))
    world.step()
    assert second.text_nodes, "it found none of its pages"
    assert not any(node.is_proven for node in second.text_nodes)


def test_proven_pages_beyond_their_share_go_over_least_recently_used_first() -> None:
    cache = PageCache(PagePool(9, 4))
    for text in ("abc", "xy", "mno", "abc", "xy"):  # eight pages, the first five of them asked for again
        for node in reversed(_add(cache, text)):
            cache.release(node)
    # c goes over behind m, as of eight idle pages four may stay proven; of six three, so b goes over behind c; …
    assert _gone(cache, "abcmnoxy") == ["o", "no", "mno", "cmno", "bcmno", "abcmno", "abcmnoy", "abcmnoxy"]


def test_a_stack_that_was_asked_for_again_goes_with_its_last_text() -> None:
    world = make_world(6, 4, 1, 40)  # 5 pages
    for name in range(3):
        _run_alone(world, _sequence(str(name), own_text(name, 5)))
    _start(world, _sequence("all", own_text(9, 15), (4,)))  # five pages
    assert list(world.scheduler.cache.root.children) == [("", "(4,)/0")]


def _add(cache: PageCache, text: str) -> list[CachedPages]:
    """Hold a text's nodes, new where they are not there yet."""
    nodes = [cache.root]
    for letter in text:
        node = nodes[-1].children.get(letter)
        if node is None:
            node = CachedPages(letter, cache.take(1), nodes[-1])
            cache.add(node)
        else:
            cache.hold(node)
            cache.prove([node])
        nodes.append(node)
    return nodes[1:]


def _gone(cache: PageCache, texts: str) -> list[str]:
    """Which of the letters have left, in order, after each page that is taken."""
    gone = []
    for _ in range(cache.available):
        cache.take(1)
        gone.append("".join(sorted(set(texts) - {str(node.key) for node in _below(cache.root)})))
    return gone


def _below(node: CachedPages) -> list[CachedPages]:
    return [found for child in node.children.values() for found in (child, *_below(child))]
