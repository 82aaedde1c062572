"""Numbers about this process for services: what was compiled, which kernels run, what was left to Inductor and why.

Enters: one :class:`~lz_compile.report.GraphReport` a compiled graph, and look-ups in the performance database.  Leaves:
:func:`snapshot`, or the same numbers through one of two libraries (``pip install 'lz-compile[metrics]'``)::

    lz_compile.metrics.prometheus()       # a collector in prometheus_client's registry
    lz_compile.metrics.opentelemetry()    # observable instruments of the global meter provider

Numbers change while something is compiled, never while compiled code runs.  Their memory is bounded: each family keeps
:data:`MOST_SERIES` combinations of labels, those that come later are counted together under :data:`OTHER`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lz_compile.report import GraphReport

MOST_SERIES = 256
OTHER = "other"

# Upper bounds of the buckets of histograms, in seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)

# One lock for all families, so that a snapshot is of one moment.
_lock = threading.Lock()


@dataclass(frozen=True)
class Series:
    """One combination of label values.  Of a histogram ``value`` is the sum of what was observed, and ``buckets`` are
    the counts of observations up to each bound of :data:`BUCKETS`, then of all."""

    labels: tuple[str, ...]
    value: float
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """Series that share a name: ``name`` is without the unit's or the total's suffix of an exporter."""

    name: str
    help: str
    labels: tuple[str, ...]
    histogram: bool
    series: tuple[Series, ...]


class Counter:
    """Sums by label values."""

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name, self.help, self.labels = name, help, labels
        self._sums: dict[tuple[str, ...], float] = {}
        self._other = (OTHER,) * len(labels)

    def add(self, *labels: str, amount: float = 1) -> None:
        with _lock:
            sums = self._sums
            if labels not in sums and len(sums) >= MOST_SERIES - 1:
                labels = self._other
            sums[labels] = sums.get(labels, 0) + amount

    def family(self) -> Family:
        series = (Series(labels, value) for labels, value in self._sums.items())
        return Family(self.name, self.help, self.labels, False, tuple(series))

    def clear(self) -> None:
        self._sums.clear()


class Histogram:
    """How seconds are distributed."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        with _lock:
            self._counts[bisect_left(BUCKETS, seconds)] += 1
            self._sum += seconds

    def family(self) -> Family:
        running, buckets = 0, []
        for count in self._counts:
            running += count
            buckets.append(running)
        return Family(self.name, self.help, (), True, (Series((), self._sum, tuple(buckets)),))

    def clear(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0


compiles = Counter("lz_compile_compiles", "Graphs compiled, by what became of them.", "outcome")
compile_seconds = Histogram("lz_compile_compile_seconds", "Time of one graph's compile, Inductor's part included.")
planning_seconds = Histogram("lz_compile_planning_seconds", "Time of one graph's own steps, measuring left out.")
step_seconds = Counter("lz_compile_step_seconds", "Time in each step of compiling, summed.", "step")
regions = Counter("lz_compile_regions", "Regions found, by the kernel that runs them.", "kind", "kernel")
fallbacks = Counter("lz_compile_fallbacks", "Regions left to Inductor, by the class of the reason.", "kind", "reason")
look_ups = Counter("lz_compile_database_lookups", "Records asked of the performance database.", "result")

_FAMILIES: tuple[Counter | Histogram, ...] = (
    compiles,
    compile_seconds,
    planning_seconds,
    step_seconds,
    regions,
    fallbacks,
    look_ups,
)


def compiled(report: GraphReport) -> None:
    """Counts one compiled graph."""
    compiles.add(report.outcome)
    compile_seconds.observe(sum(receipt.seconds for receipt in report.receipts))
    planning_seconds.observe(report.own_seconds)
    for receipt in report.receipts:
        step_seconds.add(receipt.step, amount=receipt.seconds)
    for region in report.regions:
        regions.add(region.kind, region.kernel)
        if region.cause and region.cause != "covered":
            fallbacks.add(region.kind, region.cause)


def looked_up(hits: int, misses: int) -> None:
    """Counts records that were found in the performance database, and those that were not."""
    look_ups.add("hit", amount=hits)
    look_ups.add("miss", amount=misses)


def snapshot() -> list[Family]:
    """All numbers of this process, of one moment."""
    with _lock:
        return [family.family() for family in _FAMILIES]


def reset() -> None:
    """All numbers start again, as after a start of the process."""
    with _lock:
        for family in _FAMILIES:
            family.clear()


# -- prometheus_client


def prometheus(registry: Any = None) -> Any:
    """Registers a collector of these numbers with ``registry`` (prometheus_client's own when None); returns it.

    Raises:
        ImportError: prometheus_client is not installed.
        ValueError: the registry has one already.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise _missing("prometheus_client") from error
    collector = _Collector()
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector


class _Collector:
    """A custom collector: numbers are read when somebody scrapes."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        bounds = [*map(str, BUCKETS), "+Inf"]
        for family in snapshot():
            if family.histogram:
                histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
                for series in family.series:
                    histogram.add_metric(series.labels, list(zip(bounds, series.buckets)), series.value)
                yield histogram
            else:
                counter = CounterMetricFamily(family.name, family.help, labels=family.labels)
                for series in family.series:
                    counter.add_metric(series.labels, series.value)
                yield counter

    describe = collect  # by these names a registry refuses a second collector


# -- OpenTelemetry


def opentelemetry(meter_provider: Any = None) -> None:
    """Creates observable counters for these numbers, of ``meter_provider`` (the global one when None).

    ``lz_compile_regions`` is named ``lz_compile.regions``.  OpenTelemetry has no observable histogram: of a histogram
    there are ``.sum``, ``.count`` and ``.bucket``, with the bound in the attribute ``le`` as Prometheus has it.

    Raises:
        ImportError: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry.metrics import Observation, get_meter
    except ImportError as error:
        raise _missing("opentelemetry-api") from error
    meter = get_meter("lz_compile", meter_provider=meter_provider)

    def create(name: str, help: str, read: Callable[[], Iterable[tuple[float, dict[str, str]]]], unit: str) -> None:
        def observe(options: Any) -> Iterator[Any]:
            for value, attributes in read():
                yield Observation(value, attributes)

        meter.create_observable_counter(name, callbacks=[observe], description=help, unit=unit)

    for source in _FAMILIES:
        name = source.name.replace("lz_compile_", "lz_compile.", 1)
        unit = "s" if source.name.endswith("_seconds") else "1"
        if isinstance(source, Counter):
            create(name, source.help, _sums(source), unit)
        else:
            create(f"{name}.sum", source.help, _sums(source), unit)
            create(f"{name}.count", source.help, _count(source), "1")
            create(f"{name}.bucket", source.help, _buckets(source), "1")


def _read(source: Counter | Histogram) -> Family:
    with _lock:
        return source.family()


def _sums(source: Counter | Histogram) -> Callable[[], Iterator[tuple[float, dict[str, str]]]]:
    def read() -> Iterator[tuple[float, dict[str, str]]]:
        family = _read(source)
        for series in family.series:
            yield series.value, dict(zip(family.labels, series.labels))

    return read


def _count(source: Histogram) -> Callable[[], list[tuple[float, dict[str, str]]]]:
    return lambda: [(_read(source).series[0].buckets[-1], {})]


def _buckets(source: Histogram) -> Callable[[], list[tuple[float, dict[str, str]]]]:
    return lambda: [
        (count, {"le": str(bound)}) for bound, count in zip((*BUCKETS, "+Inf"), _read(source).series[0].buckets)
    ]


def _missing(package: str) -> ImportError:
    return ImportError(f"{package} is not installed: pip install 'lz-compile[metrics]'")
