"""A probe for the sizes that grow with the number of segments, and for the length of a segment.

The code runs under fake tensors of several sizes. A run counts how often each parameter, or other tensor that the code
reaches, is used. One more segment is one more use.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

from rmtc import heuristics
from rmtc.capture.alike import Alike
from rmtc.capture.arguments import Arguments, Growth, Path, show
from rmtc.capture.results import describe_result, describer_of
from rmtc.capture.session import Session
from rmtc.capture.sizes import Cut, Probed, Sizes, arguments_of
from rmtc.capture.uses import EnoughError, ProbeRun, UseCount
from rmtc.capture.uses_of_layers import LayerUses
from rmtc.errors import CaptureError
from rmtc.grouping import by_key
from rmtc.stages import substage

logger = logging.getLogger(__name__)


class _Prober:
    def __init__(self, session: Session, alike: Alike) -> None:
        self.session, self._layers = session, LayerUses(session, alike)
        self._runs: dict[tuple[Growth, int, int, bool], ProbeRun | None] = {}
        self._taken = {size for lifted in session.lifted for size in lifted.tensor.shape}
        self._taken |= {size for tensor in session.arguments.tensors().values() for size in tensor.shape}

    @substage("run a probe")
    def run(self, growth: Growth, length: int, batch: int, short: bool = False) -> ProbeRun:
        """Run the code once at some sizes; a short run ends after a few segments.

        Raises:
            UntoldError: if what it returns cannot be returned again, whatever the sizes.
            RmtcError: if the user's code raises an error.
        """
        args, kwargs = arguments_of(self.session, growth, length, batch)
        varying = {path for path, _ in growth.dims}
        handed = Arguments(args, kwargs, self.session.arguments.names)
        given = handed.tensors().items()
        fixed = [tensor for path, tensor in given if path not in varying and growth.list_of(path) is None]
        count = UseCount([*self.session.fake_tensors, *fixed], length, short)
        fakes = self.session.fake_mode
        installed, answered = self.session.installed(self.session.fake_tensors), self._layers.answered(count)
        with installed, fakes, fakes.watched(count.note), answered:
            try:
                result = self.session.call(args, kwargs)
                describe_result(result, describer_of(self.session, handed))  # before anything is traced
            except EnoughError:
                count.run.ended = False
        return count.run

    def attempt(self, growth: Growth, length: int, batch: int, short: bool = False) -> ProbeRun | None:
        """Run the code as :meth:`run`, or return the run that was made before with the same arguments.

        It is None if the user's code does not take these sizes, or the length is none.
        """
        key = (growth, length, batch, short)
        if length < 1:
            return None
        if key not in self._runs:
            try:
                self._runs[key] = self.run(growth, length, batch, short)
            except CaptureError as error:
                logger.debug("length %d, batch %d does not run: %s", length, batch, error.reason)
                self._runs[key] = None
        return self._runs[key]

    def of_model(self, growth: Growth, length: int, batch: int) -> dict[int, int] | None:
        """Return how often a run uses each tensor that is no argument.

        It is None if the user's code does not take these sizes.
        """
        run = self.attempt(growth, length, batch)
        if run is None:
            return None
        return {number: count for number, count in run.roots.items() if number < len(self.session.fake_tensors)}

    def cut(self, growth: Growth, length: int, batch: int) -> Cut | None:
        """Return how texts are cut into segments of a length; None if they are not.

        A segment more must use the layers more often, some of those again that one segment uses: one more item in a
        list of memories runs another layer. If a text of one segment takes one position more, it must begin another
        segment. Else :meth:`_staircase` looks for the position that does.
        """
        one = self.attempt(growth, length, batch)
        if one is not None and one.ended and one.total:
            two = self.attempt(growth, 2 * length, batch)
            if two is None:
                return None
            if one.total < two.total and any(two.roots[root] > often for root, often in one.roots.items() if often):
                more = None if growth.lists else self.attempt(growth, length + 1, batch)
                if more is None or more.total != one.total:
                    return Cut(length)
                less = self.attempt(growth, length - 1, batch) if length > 1 else one
                if less is None or not less.total:
                    return Cut(length)
        return None if growth.lists or length < 2 else self._staircase(growth, length, batch)

    def _staircase(self, growth: Growth, length: int, batch: int) -> Cut | None:
        """Return how texts are cut that have more or fewer positions than their segments.

        The uses of the layers are a staircase over the length of the text. One stair is as wide as a segment. If the
        pieces of the text and the last use of each tensor are the same all along a stair, the code leaves out the rest
        of the text.

        Args:
            growth: the arguments that grow.
            length: positions of a segment, at least two.
            batch: the batch size.
        """
        low, high = 4 * length, 5 * length  # what comes before the first segment may be longer than one
        before, after = (self.attempt(growth, each, batch) for each in (low, high))
        if before is None or after is None or before.total >= after.total:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            run = self.attempt(growth, middle, batch)
            if run is None or run.total not in (before.total, after.total):
                return None
            low, high = (middle, high) if run.total == before.total else (low, middle)
        first, second, last, above = (self.attempt(growth, high + each, batch) for each in (0, 1, length - 1, length))
        if first is None or second is None or last is None or above is None:
            return None
        if last.total != after.total or above.total != 2 * after.total - before.total:
            return None
        # The number of segments is what most tensors tell that each segment uses.
        each = {root: count - before.roots[root] for root, count in after.roots.items() if count > before.roots[root]}
        segments, _ = Counter(after.roots[root] // count for root, count in each.items()).most_common(1)[0]
        pieces = [[size for size in run.cuts if size <= length] for run in (first, second)]
        drops = pieces[0] == pieces[1] and all(first.last_use[root] == second.last_use[root] for root in each)
        return Cut(length, high - segments * length + (0 if drops else length - 1), drops)

    def segment_length(self, growth: Growth, length: int, batch: int) -> Cut | None:
        """Find the least length of a segment that a cut of this length suggests and further runs confirm.

        A length with which all of a segment's tensors are used again is preferred to smaller ones. It is None if no
        length is confirmed.
        """
        run = self.attempt(growth, length, batch, short=True)
        if run is None and not growth.lists:
            return None
        found = {*run.cuts, *run.steps} if run else set[int]()
        sizes = {1} if growth.lists else {size for size in found if 0 < size < length}
        least: Cut | None = None
        for size in sorted(sizes):
            cut = self.cut(growth, size, batch)
            if cut is not None and (size == max(sizes) or self._goes_on(growth, cut, batch)):
                if run is None or self._all_again(growth, cut, batch, run):
                    return cut
                least = least or cut
        return least

    def _goes_on(self, growth: Growth, cut: Cut, batch: int) -> bool:
        """Tell whether a text goes on as it began: a third segment uses the layers more often than two do.

        A part that the code puts before a text may look like a segment in short texts. So may a segment that is a
        position shorter than whole ones, if these use more: then a position behind the first segment begins another
        one, and a position behind the second does not.
        """
        one, two, three = (self.attempt(growth, cut.extra + times * cut.length, batch) for times in (1, 2, 3))
        if two is None or three is None or two.total >= three.total:
            return False
        begun, more = (self.attempt(growth, cut.extra + times * cut.length + 1, batch) for times in (1, 2))
        if one is None or begun is None or more is None or begun.total == one.total:
            return True
        return more.total != two.total

    def _all_again(self, growth: Growth, cut: Cut, batch: int, text: ProbeRun) -> bool:
        """Tell whether a second segment uses again every tensor that a longer text uses again.

        A layer such as `nn.GRU` uses some of its weights at each position, and others once per segment.
        """
        first = 2 if cut.extra else 1  # the first segment may be a short one, and nothing be left of the text
        one, two = (self.attempt(growth, cut.extra + times * cut.length, batch) for times in (first, first + 1))
        if one is None or two is None:
            return False
        return all(two.roots[key] > often for key, often in one.roots.items() if text.roots[key] > often)

    def distinct(self, length: int) -> int:
        """Return the least length, not below the given one, that no other dimension in sight has."""
        while length in self._taken:
            length += 1
        return length


def _candidates(session: Session) -> list[tuple[Growth, int]]:
    """Return the sets of arguments that may grow together, likeliest first, with their present length."""
    tensors = session.arguments.tensors()
    by_size = by_key((size, (path, dim)) for path, tensor in tensors.items() for dim, size in enumerate(tensor.shape))
    found: list[tuple[Growth, int]] = []
    for size, places in by_size.items():
        dims = sorted({dim for _, dim in places}, reverse=True)
        if len({path for path, _ in places}) == len(places):
            found.append((Growth(dims=frozenset(places)), size))
        if len(dims) > 1:
            found += [(Growth(dims=frozenset(p for p in places if p[1] == dim)), size) for dim in dims]

    # Texts first: integers before floats, the second dimension before the first and the later ones.
    def rank(candidate: tuple[Growth, int]) -> tuple[int, int, int]:
        places = candidate[0].dims
        integers = any(not tensors[path].is_floating_point() for path, _ in places)
        best = min((1, 0, 2, 3).index(dim) if dim < 4 else 4 for _, dim in places)
        return (0 if integers else 1, best, -len(places))

    found.sort(key=rank)
    lists = [(Growth(lists=frozenset({path})), length) for path, length in session.arguments.lists().items()]
    return found + lists


def with_batch(session: Session, growth: Growth) -> tuple[Growth, int]:
    """Add to a growth the arguments whose first dimension is the batch.

    Returns:
        The growth and the batch size, which is 1 if there is no batch.
    """
    tensors = session.arguments.tensors()
    texts = [path for path, dim in sorted(growth.dims, key=str) if dim != 0]
    texts += [path for path in tensors if any(path[: len(each)] == each for each in growth.lists)]
    batch = next((tensors[path].shape[0] for path in texts if tensors[path].ndim > 1), None)
    if batch is None:
        return growth, 1
    first = {path for path, tensor in tensors.items() if tensor.ndim and tensor.shape[0] == batch}
    paths = first - {path for path, dim in growth.dims if dim == 0}
    lists = {each for each in growth.lists if all(path in paths for path in tensors if path[: len(each)] == each)}
    return Growth(growth.dims, growth.lists, frozenset(paths | lists)), batch


def _items(session: Session, growth: Growth, length: int) -> tuple[Growth, int, int]:
    """Add to a growth of lists the length of an item.

    The last item of a list may be shorter than the others, in each of its tensors or in some. All dimensions that
    differ must then have the same two sizes.

    Returns:
        The growth, the length of the text and the length of a segment.

    Raises:
        CaptureError: if the items differ in another way.
    """
    shapes: dict[int, dict[Path, tuple[int, ...]]] = {}
    for path, tensor in session.arguments.tensors().items():
        of = growth.list_of(path)
        if of is not None:
            shapes.setdefault(path[len(of)], {})[of + path[len(of) + 1 :]] = tuple(tensor.shape)
    items = [shapes[number] for number in sorted(shapes)]
    differing = {
        (place, dim, size, last)
        for place, shape in items[0].items()
        for dim, (size, last) in enumerate(zip(shape, items[-1][place], strict=True))
        if size != last
    }
    sizes = {(size, last) for *_, size, last in differing}
    if any(item != items[0] for item in items[:-1]) or len(sizes) > 1 or any(last > size for size, last in sizes):
        raise CaptureError(
            f"the items of {' or '.join(sorted(map(show, growth.lists)))} differ in shape, not only the last one in "
            "its length",
            remedy="pass segments of one length, the last one of that length or shorter",
        )
    if not sizes:
        return growth, length, 1
    ((size, last),) = sizes
    growth = replace(growth, item_dims=frozenset((place, dim) for place, dim, *_ in differing), item_length=size)
    return growth, (length - 1) * size + last, size


def _joined(
    session: Session, prober: _Prober, found: list[tuple[Growth, int, int, Cut]]
) -> list[tuple[Growth, int, int, Cut]]:
    """Join lists that grow together into one growth.

    They must all have one length. Runs with one and with two items of each must use the model's tensors like runs with
    as many items of one list alone. One more item of one list alone must begin no other segment.

    Args:
        session: the user's call.
        prober: runs it.
        found: the growths that were found, each with its length, batch size and how it is cut.
    """
    made: list[tuple[Growth, int, int, Cut]] = []
    for each in found:
        growth, length, batch, cut = each
        lists = {path for path, count in session.arguments.lists().items() if growth.lists and count == length}
        lists = {path for path in lists if not any(path != other and path[: len(other)] == other for other in lists)}
        if len(lists) > 1:
            together, both = with_batch(session, Growth(lists=frozenset(lists)))
            alone, joined = ([prober.of_model(one, count, batch) for count in (1, 2)] for one in (growth, together))
            # Another item of one alone begins no other segment: the other list ends.
            ends = prober.of_model(growth, length + 1, batch) in (None, prober.of_model(growth, length, batch))
            if ends and None not in joined and alone == joined:
                each = (together, length, both, cut)
        if each not in made:
            made.append(each)
    return made


def _in_words(growth: Growth) -> str:
    dims = [f"dimension {dim} of {show(path)}" for path, dim in sorted(growth.dims, key=str)]
    return ", ".join([*dims, *(f"the number of items of {show(path)}" for path in sorted(growth.lists, key=str))])


def probe(session: Session, alike: Alike, segment_length: int | None = None) -> Probed:
    """Find what grows in a call and how long a segment is.

    Args:
        session: the user's call.
        alike: its modules that are alike.
        segment_length: the user's hint, in positions. It is checked, and no other length is tried in its place.

    Raises:
        CaptureError: if nothing grows, or more than one dimension could be the length. Also if the hint does not fit,
            or the text makes no segment.
        RefusedError: if the user's code does what no capture can hold.
    """
    if segment_length is not None and segment_length < 1:
        raise CaptureError(
            f"segment_length={segment_length} was given: a segment has at least one position",
            remedy="pass the number of positions from one segment to the next, or leave segment_length out",
        )
    # Try the sizes of the call itself.
    prober = _Prober(session, alike)
    candidates = [(*with_batch(session, growth), length) for growth, length in _candidates(session)]
    sizes = [length for _, _, length in candidates]
    found: list[tuple[Growth, int, int, Cut]] = []
    for growth, batch, length in candidates:
        if segment_length is not None:
            # A text shorter than the hint may have shorter segments: look before a text of the hint's length is made.
            told = 0 < length <= segment_length and not growth.lists
            least = prober.segment_length(growth, length, batch) if told else None
            if least is not None:
                raise CaptureError(
                    f"segment_length={segment_length} was given, and of the {length} positions of this call the "
                    f"forward takes {least.length} at a time",
                    remedy=f"pass segment_length={least.length}, or leave it out",
                )
            found_cut = prober.cut(growth, segment_length, batch)
        else:
            found_cut = prober.segment_length(growth, length, batch)
        if found_cut is not None:
            found.append((growth, length, batch, found_cut))
            if sizes.count(length) == 1:
                break
    # The text may be shorter than two segments: try longer ones.
    for factor in () if found or segment_length is not None else heuristics.PROBE_FACTORS:
        for growth, batch, length in candidates:
            longer = prober.segment_length(growth, prober.distinct(max(length, 1) * factor), batch)
            if longer is not None:
                found.append((growth, length, batch, longer))
                break
        if found:
            break
    # Join lists that grow together, and refuse all but one growth.
    found = _joined(session, prober, found)
    if not found:
        # The user's own sizes must run at all: if not, this raises the reason.
        growth, batch, length = candidates[0] if candidates else (Growth(), 1, 1)
        own = prober.run(growth, length, batch)
        if segment_length is not None:
            raise CaptureError(
                f"segment_length={segment_length} was given, but in no argument do that many positions make one "
                "segment and one more begin the next",
                remedy="pass the number of positions from one segment to the next, or leave segment_length out",
            )
        pieces = "pieces that are folded into the batch run at once already"
        place = f". The place is the first that cuts an argument; {pieces}" if own.first_cut is not None else ""
        raise CaptureError(
            "no argument was found whose length makes the forward run its layers once more: this is no loop over "
            f"segments, or its number of segments is fixed{place}",
            location=own.first_cut,
            remedy="pass a longer input, or segment_length=... if you know it; pass segments that are cut already as a "
            "list of tensors, or of dicts or tuples that hold nothing but tensors",
        )
    if len(found) > 1:
        raise CaptureError(
            f"the length of the text could be {' or '.join(_in_words(growth) for growth, *_ in found)}",
            remedy="call it with a batch size that differs from the length, or pass segment_length=...",
        )
    # Find the lengths of the text and of a segment.
    growth, length, batch, cut = found[0]
    segment, extra, drops = cut
    if growth.lists:
        growth, length, segment = _items(session, growth, length)
    if length < 1:
        raise CaptureError(
            "the text is empty: there is no segment to run", remedy="pass a text of one position or more"
        )
    if extra <= -segment:
        raise CaptureError(
            f"the code adds {-extra} positions to the text, which are as many as a segment of {segment} has, or more",
            remedy="add them before the call, or fewer",
        )
    # See which other batch sizes and lengths use the same tensors as often.
    free_batch, free_tail = False, False
    whole, ragged = extra + 2 * segment, extra + (2 if drops else 1) * segment + max(1, segment // 2)
    two = prober.attempt(growth, whole, batch)

    def same(trial: Growth, length: int, batch: int) -> bool:
        run = prober.attempt(trial, length, batch)
        return run is not None and two is not None and run.roots == two.roots

    alone = replace(growth, batch=growth.lists | {path for path, _ in growth.dims})
    for trial in dict.fromkeys((growth, alone)):
        if not trial.batch or free_batch:
            continue
        if segment > 1 and same(trial, ragged, batch + 1):
            free_batch, free_tail, growth = True, True, trial
        elif same(trial, whole, batch + 1):
            free_batch, growth = True, trial
    if segment > 1 and not free_tail:
        free_tail = same(growth, ragged, batch)
    if segment > 1 and not (drops or free_tail or growth.lists):
        drops = free_tail = same(growth, ragged + segment, batch)
    own_tail = segment > 1 and not free_tail and prober.attempt(growth, ragged, batch) is not None
    # Cut the user's text.
    plan = Probed(growth, segment, Sizes(0, batch, segment), free_batch, free_tail, extra, drops, own_tail)
    segments, tail = plan.cut(length)
    if not segments:
        raise CaptureError(
            f"the text of {length} positions makes no segment of {segment}: there is none to run",
            remedy="pass a text of one segment or more",
        )
    return replace(plan, sizes=Sizes(segments, batch, tail))
