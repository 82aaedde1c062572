"""Measures what a model or a program needs before it is needed: the work behind ``lz-compile tune``.

Enters: a Hugging Face configuration and the calls of it that matter (:class:`Workload`), or a Python script.  Leaves: a
:class:`Tuned` with a report for each graph; the figures are in the performance database, where every later compile
finds them.  What is there already is not measured again, so that an interrupted run goes on where it stopped.

A configuration becomes a model of random weights with few layers (layers that differ only in number need the same
kernels, except the last).  Its graphs go through the road up to the plan, which is what measures; they then run as they
are, since code from Inductor would be thrown away.  A script runs whole, as ``__main__``.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lz_compile import config
from lz_compile.report import GraphReport, reports

if TYPE_CHECKING:
    import torch.fx as fx

    from lz_compile.database import Record

Phase = Literal["decode", "prefill", "both"]

# What a listener of lz_compile.measure hears: the region's signature, the kernel that is measured next.
Listener = Callable[[str, str], None]


class TuneError(Exception):
    """What was asked for cannot be tuned; the message says why, on one line."""


class Interrupted(Exception):
    """The user stopped it; ``tuned`` holds what was done."""

    def __init__(self, tuned: Tuned) -> None:
        super().__init__("interrupted")
        self.tuned = tuned


@dataclass(frozen=True)
class Workload:
    """A model and the calls to tune.

    ``target`` is a configuration class of transformers (``LlamaConfig``), a model type (``llama``), a JSON file, a
    directory with ``config.json``, or the name of a model in the local Hugging Face cache.  ``settings`` override its
    fields.  ``layers`` is raised where the model has more kinds of layer than that, 0 keeps the model's own number; of
    the last layer a prompt needs only the last rows, so that two differ.
    ``sequence`` is the prompt's length, ``cache`` the slots of the static cache (0: no call uses one), ``position`` how
    many of them are filled when a token is decoded.
    """

    target: str
    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    dtype: str = "bfloat16"
    batch: int = 1
    phase: Phase = "both"
    sequence: int = 2048
    cache: int = 4096
    position: int = 1000
    mode: str = "default"
    device: str = "cpu"


@dataclass
class Tuned:
    """``measured`` and ``rejected`` count the records of this run: kernels that were timed, and that did not qualify;
    ``remembered`` the figures that the database had.  ``failed`` are calls that did not run, with the reason."""

    graphs: list[GraphReport] = field(default_factory=list)
    measured: int = 0
    rejected: int = 0
    remembered: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


def tune_model(work: Workload, budget: float, on_call: Callable[[str], None] = lambda name: None) -> Tuned:
    """Measures every kernel for every region of the calls of a model; ``budget`` is in seconds for each graph.

    ``on_call(name)`` is told of each call before it runs.

    Raises:
        TuneError: there is no such configuration, or no model of it can be built.
        Interrupted: Ctrl-C; what was stored stays.
    """
    device = _device(work.device)
    graphs: list[GraphReport] = []
    with _counted(lambda: graphs) as tuned, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames arguments between versions
        model = build(work, device)
        planner = _Planner(work.mode, budget, graphs)
        for name, call in calls(work, model):
            on_call(name)
            torch._dynamo.reset()
            try:
                with torch.no_grad():
                    call(torch.compile(model, backend=planner, dynamic=False))
            except Exception as error:
                if config.strict:
                    raise
                tuned.failed[name] = _one_line(error)
        torch._dynamo.reset()
    return tuned


def tune_script(path: str, arguments: Sequence[str], budget: float) -> Tuned:
    """Runs a script as ``__main__``; what it compiles with backend ``"layerzero"`` is measured.

    Raises:
        TuneError: the script failed; the message says where.
        Interrupted: Ctrl-C; what was stored stays.
    """
    import runpy

    before = {id(report.graphs[0]) for report in reports()}

    def graphs() -> list[GraphReport]:
        return [report.graphs[0] for report in reports() if id(report.graphs[0]) not in before]

    with _counted(graphs) as tuned, _as_main(path, arguments), config.patch(measure="auto", measure_budget=budget):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            if stop.code not in (None, 0):
                tuned.failed[path] = f"exited with {stop.code}"
        except Exception as error:
            tuned.failed[path] = f"{_place(error, path)}{_one_line(error)}"
    return tuned


class _Planner:
    """A Dynamo backend that takes the road as far as the plan, and runs the graph as it came."""

    def __init__(self, mode: str, budget: float, graphs: list[GraphReport]) -> None:
        self.mode, self.budget, self.graphs = mode, budget, graphs

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from lz_compile.backend import improve
        from lz_compile.options import split_options

        ours, inductor = split_options(self.mode, {"measure": "auto", "measure_budget": self.budget})
        report = GraphReport.start(self.mode, None)
        with config.patch(ours):
            improve(module, report, inductor)
        self.graphs.append(report)
        return module.forward


@contextlib.contextmanager
def _counted(graphs: Callable[[], list[GraphReport]]) -> Iterator[Tuned]:
    """Fills in what a run did, also when Ctrl-C ends it."""
    tuned = Tuned()
    started, begin = time.time(), time.perf_counter()

    def settle() -> None:
        tuned.graphs = list(graphs())
        fresh = _records_since(started)
        tuned.measured = sum(record.seconds is not None for record in fresh)
        tuned.rejected = sum(not record.qualified for record in fresh)
        remembered = {
            (row.signature, candidate["kernel"])
            for row in rows(tuned.graphs)
            for candidate in row.candidates
            if candidate["source"] == "remembered"
        }
        tuned.remembered = len(remembered)
        tuned.seconds = time.perf_counter() - begin

    try:
        yield tuned
    except KeyboardInterrupt:
        settle()
        raise Interrupted(tuned) from None
    settle()


def _records_since(started: float) -> list[Record]:
    """The records that were stored since; those of other processes that share the database are among them."""
    from lz_compile.database import default

    return [r for r in default().records() if r.created >= started and r.key.kernel != "machine.roof"]


# -- progress


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[bool]:
    """Has the listener told of each kernel before it is measured; False where measuring tells nobody."""
    from lz_compile import measure

    listeners = getattr(measure, "listeners", None)
    if listeners is None:
        yield False
        return
    listeners.append(listener)
    try:
        yield True
    finally:
        listeners.remove(listener)


class Progress:
    """Counts steps, one a kernel of a region signature: ``done`` of ``total``.

    How many kernels take a region is known only once they were asked, so a new signature adds all kernels of its kind,
    and leaving it behind counts those that were not heard of as done.
    """

    def __init__(self, kernels_of_kind: Callable[[str], int], show: Callable[[str, int, int], None]) -> None:
        self.kernels_of_kind = kernels_of_kind
        self.show = show
        self.total = self.done = 0
        self._signature = ""
        self._end = 0

    def hear(self, signature: str, kernel: str) -> None:
        """A :data:`Listener`."""
        if signature != self._signature:
            self.finish()
            self._signature = signature
            self.total += self.kernels_of_kind(_kind(signature))
            self._end = self.total
        else:
            self.done = min(self.done + 1, self._end)
        self.show(f"{kernel}: {describe(signature)}", self.done, self.total)

    def finish(self) -> None:
        self.done = self._end


def _kind(signature: str) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(signature).get("kind", ""))
    return ""


def describe(signature: str) -> str:
    """A signature in a few words; one that is not JSON as it came."""
    try:
        facts = json.loads(signature)
    except ValueError:
        return signature
    if not isinstance(facts, dict):
        return signature
    try:
        heads, kv_heads = facts["heads"]
        size, value_size = facts["head_size"]
        mask = [word for word in facts["mask"] if word != "empty_row"]
        if "mask_tensor" in facts:
            mask.append("tensor")
        words = [
            f"batch {facts['batch']}, {heads}/{kv_heads} heads, {facts['queries']} x {facts['keys']}",
            f"size {size}" if size == value_size else f"size {size}/{value_size}",
            f"{facts['dtype']} {facts['device']}",
        ]
        return f"{facts['kind']} {', '.join(words)}, mask {'+'.join(mask) or 'none'}"
    except (ValueError, KeyError, TypeError):  # not attention
        kind = facts.pop("kind", "")
        return " ".join([str(kind), ", ".join(f"{name} {value}" for name, value in facts.items())]).strip()


# -- what came out


@dataclass
class Row:
    """Equal sites of one or more graphs: what they are, the kernels that competed, fastest first, and the others."""

    signature: str
    mode: str
    sites: int
    chosen: str
    reason: str
    candidates: list[dict[str, Any]]
    rejected: dict[str, str]


def rows(graphs: Sequence[GraphReport]) -> list[Row]:
    """A row for each signature and mode, in the order of first appearance.

    A later compile remembers what an earlier one measured; the row says measured.
    """
    found: dict[tuple[str, str], Row] = {}
    for graph in graphs:
        for region in graph.regions:
            mask = f", mask {region.mask}" if region.mask else ""
            # A mask may read what belongs to a layer; the numbers of layers tell equal sites apart.
            text = f"{region.kind} ({region.pattern}): {region.shape}{mask}"
            signature = re.sub(r"\.\d+(?=\.)", ".*", text)
            key = (signature, graph.mode)
            if key in found:
                found[key].sites += 1
                continue
            candidates = [
                {
                    "kernel": c.kernel,
                    "microseconds": c.microseconds,
                    "spread": c.spread,
                    "error": c.error,
                    "source": c.source,
                    "graph_safe": c.graph_safe,
                    "chosen": c.kernel == region.kernel,
                }
                for c in region.candidates
            ]
            rejected = dict(region.rejected)
            found[key] = Row(signature, graph.mode, 1, region.kernel, region.reason, candidates, rejected)
    return list(found.values())


# -- models


def build(work: Workload, device: torch.device) -> Any:
    """The model of a workload: random weights, made on the device in its dtype.

    Raises:
        TuneError: see :func:`tune_model`.
    """
    transformers = _transformers()
    settings = _configuration(transformers, work)
    dtype = getattr(torch, work.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TuneError(f"--dtype {work.dtype}: not a floating dtype of torch; try bfloat16, float16 or float32")
    torch.manual_seed(0)
    errors = []
    # An encoder such as BERT has a causal class too, for those who make a decoder of it; GPT-NeoX has the first field.
    encodes = getattr(settings, "is_decoder", None) is False and hasattr(settings, "add_cross_attention")
    encodes = encodes or settings.is_encoder_decoder
    for auto in (transformers.AutoModel,) if encodes else (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            with torch.device(device):
                return auto.from_config(settings, dtype=dtype, attn_implementation="sdpa").eval()
        except Exception as error:
            errors.append(_one_line(error))
    raise TuneError(f"no model of {type(settings).__name__} can be built: {errors[-1]}")


def calls(work: Workload, model: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """The calls to tune, by name; each takes the compiled model.

    A decoder: the prompt without a cache, the prompt into a static cache, and a token with a static cache, once with
    the mask built inside the graph and once with the mask that ``generate()`` hands to the step it compiles.  A model
    that does not generate has one plain call.

    Raises:
        TuneError: the model takes something else than tokens.
    """
    if model.main_input_name not in ("input_ids", "pixel_values") or model.config.is_encoder_decoder:
        raise TuneError(f"{type(model).__name__} takes more than tokens: tune a script that calls it as you do")
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        shape = (work.batch, model.config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        pixels = torch.randn(shape, device=model.device, dtype=model.dtype)
        yield "forward", lambda compiled: compiled(pixel_values=pixels)
        return
    prompt = _tokens(work, model, work.sequence)
    if not model.can_generate():
        yield "forward", lambda compiled: compiled(input_ids=prompt)
        return
    if work.phase in ("prefill", "both"):
        yield (
            "prefill without cache",
            lambda compiled: compiled(input_ids=prompt, use_cache=False, logits_to_keep=1),
        )
        if work.sequence <= work.cache:
            yield (
                "prefill into a static cache",
                lambda compiled: compiled(
                    input_ids=prompt, past_key_values=_static_cache(work, model, 0), logits_to_keep=1
                ),
            )
    if work.phase in ("decode", "both") and work.cache:
        token = _tokens(work, model, 1)
        yield (
            "decode",
            lambda compiled: compiled(input_ids=token, past_key_values=_static_cache(work, model, work.position)),
        )
        yield "decode as generate() compiles it", lambda compiled: compiled(**_generated_step(work, model, token))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TuneError(
            f"tuning a model needs transformers ({error}): pip install 'lz-compile[examples]', or tune a script"
        ) from None
    return transformers


def _configuration(transformers: Any, work: Workload) -> Any:
    settings = _load_configuration(transformers, work)
    unknown = [name for name in work.settings if not hasattr(settings, name)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(settings.to_dict()), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TuneError(f"--set {unknown[0]}: {type(settings).__name__} has no such field{hint}")
    text = settings.get_text_config()
    if work.layers and getattr(text, "num_hidden_layers", None):
        kinds = list(getattr(text, "layer_types", None) or [])
        # One of each kind, and then the last one, of which only the last rows may be asked for.
        needed = max(kinds.index(kind) for kind in kinds) + 2 if len(set(kinds)) > 1 else 0
        count = min(max(work.layers, needed), text.num_hidden_layers)
        if kinds:
            text.layer_types = [*kinds[: count - 1], kinds[-1]]
        text.num_hidden_layers = count
    return settings


def _load_configuration(transformers: Any, work: Workload) -> Any:
    target = work.target
    auto = transformers.AutoConfig
    try:
        if Path(target).exists():
            return _set(auto.from_pretrained(target, local_files_only=True), work.settings)
        if target.endswith("Config"):
            cls = getattr(transformers, target, None)
            if cls is None:
                known = [name for name in dir(transformers) if name.endswith("Config")]
                near = difflib.get_close_matches(target, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise TuneError(f"transformers has no {target}{hint}")
            return _set(cls(**_accepted(cls(), work.settings)), work.settings)
        if target in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
            empty = auto.for_model(target)
            return _set(auto.for_model(target, **_accepted(empty, work.settings)), work.settings)
        return _set(auto.from_pretrained(target, local_files_only=True), work.settings)
    except TuneError:
        raise
    except Exception as error:
        if Path(target).exists() or target.endswith("Config"):
            raise TuneError(f"{target}: {_one_line(error)}") from None
        raise TuneError(
            f"{target}: no such file, configuration class, model type, or model in the local Hugging Face cache"
        ) from None


def _accepted(empty: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a configuration knows: given to its constructor, they decide what it derives from them."""
    return {name: value for name, value in settings.items() if hasattr(empty, name)}


def _set(settings: Any, changes: dict[str, Any]) -> Any:
    for name, value in changes.items():
        if hasattr(settings, name):
            setattr(settings, name, value)
    return settings


def _tokens(work: Workload, model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (work.batch, length), generator=generator).to(model.device)


def _static_cache(work: Workload, model: Any, position: int) -> Any:
    """A static cache with ``position`` tokens in it, all layers allocated as a first call does."""
    transformers = _transformers()
    cache = transformers.StaticCache(config=model.config, max_cache_len=work.cache)
    with torch.no_grad():
        model(_tokens(work, model, 1), past_key_values=cache)
    for layer in cache.layers:
        layer.cumulative_length.fill_(position)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = position
    return cache


def _generated_step(work: Workload, model: Any, token: torch.Tensor) -> dict[str, Any]:
    from transformers.masking_utils import create_masks_for_generate

    cache = _static_cache(work, model, work.position)
    valid = torch.ones(work.batch, work.position + 1, dtype=torch.int64, device=token.device)
    positions = torch.full_like(token, work.position)
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    masks = make(
        config=model.config,
        inputs_embeds=torch.empty((*token.shape, 0), dtype=model.dtype, device=token.device),
        attention_mask=valid,
        past_key_values=cache,
        position_ids=positions,
    )
    return {"input_ids": token, "past_key_values": cache, "attention_mask": masks, "position_ids": positions}


# -- small things


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TuneError(f"--device {name}: not a device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TuneError(f"--device {name}: PyTorch sees no GPU here (`lz-compile doctor` says more)")
    return device


@contextlib.contextmanager
def _as_main(path: str, arguments: Sequence[str]) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as ``python path arguments`` sets them."""
    argv, first = sys.argv, str(Path(path).resolve().parent)
    sys.argv = [path, *arguments]
    sys.path.insert(0, first)
    try:
        yield
    finally:
        sys.argv = argv
        with contextlib.suppress(ValueError):
            sys.path.remove(first)


def _place(error: BaseException, path: str) -> str:
    """``line 12: `` of the script, where the error passed through it."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
