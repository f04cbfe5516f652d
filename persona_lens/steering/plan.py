"""From interventions to hooks: a plan says what will be touched, steers inside a `with`, and leaves a receipt of what was.

One hook per layer in use. Rows of a batch may be given different interventions (`row_plan`): their sums become one matrix of
deltas, everything else acts on its own rows. Which tokens of a pass are real, prompt or response comes from whoever runs it
(`models.passes`); a forward pass of the user's own is read off its attention mask and cache.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.errors import LineageError, SteeringError
from persona_lens.models import ChatModel, Pass, cache_given, current_pass, row_aware
from persona_lens.steering.bands import require_feasible, smallest_change
from persona_lens.steering.interventions import Add, Band, Custom, Intervention, Rotate, rotated
from persona_lens.vectors import hook_name


class Receipt:
    """What a plan touched: forward passes, and tokens per layer.

    Attributes:
        passes: forward passes that were steered.
        weights_differ: interventions whose vectors come from other weights of the model's lineage.
        lineage_unknown: interventions whose vectors do not say where they come from.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.weights_differ: tuple[str, ...] = ()
        self.lineage_unknown: tuple[str, ...] = ()
        self._tokens: dict[int, Tensor] = {}

    def count(self) -> None:
        """One more forward pass."""
        self.passes += 1

    def update(self, layer: int, touched: Bool[Tensor, "batch position"]) -> None:
        """Count touched tokens; kept on the device until somebody asks."""
        n = touched.sum()
        self._tokens[layer] = self._tokens[layer] + n if layer in self._tokens else n

    @property
    def tokens(self) -> dict[int, int]:
        """Tokens touched at each layer, counted once per forward pass they travelled in."""
        return {layer: int(n) for layer, n in sorted(self._tokens.items())}

    def __str__(self) -> str:
        layers = ", ".join(f"{hook_name(layer)}: {n} tokens" for layer, n in self.tokens.items()) or "nothing"
        notes = {
            "vectors of other weights of this lineage": self.weights_differ,
            "vectors of unknown lineage": self.lineage_unknown,
        }
        said = "".join(f"; {what}: {', '.join(names)}" for what, names in notes.items() if names)
        return f"{self.passes} forward passes; {layers}{said}"


@dataclass(frozen=True, eq=False)
class Plan:
    """Interventions ready for a model: one set for every row, or one set per row (`by_row`).

    Attributes:
        sets: the sets of interventions.
        by_row: the set of each row of a `sample` call; None: every row has the first.
        receipt: what was touched so far.

    Raises:
        SteeringError, LineageError: as `plan`.
    """

    model: ChatModel
    sets: tuple[tuple[Intervention, ...], ...]
    by_row: tuple[int, ...] | None = None
    receipt: Receipt = field(default_factory=Receipt)

    def __post_init__(self) -> None:
        for chosen in self.sets:
            for one in chosen:
                _check(self.model, one)
            _check_bands(chosen)
        own = self.model.fingerprint.weights
        others = {x.name for chosen in self.sets for x in chosen if x.weights and x.weights != own}
        self.receipt.weights_differ = tuple(sorted(others))
        self.receipt.lineage_unknown = tuple(sorted({x.name for chosen in self.sets for x in chosen if not x.lineage}))

    @cached_property
    def live(self) -> tuple[tuple[Intervention, ...], ...]:
        """The sets without their zero doses, each in a fixed order of its own, so that the order given cannot matter."""
        return tuple(
            tuple(sorted((x for x in chosen if x.dose != 0.0), key=lambda x: (str(x), float(x.direction.double().sum()))))
            for chosen in self.sets
        )

    @cached_property
    def layers(self) -> list[int]:
        """Layers at which anything is done, ascending."""
        return sorted({x.layer for chosen in self.live for x in chosen})

    def explain(self) -> str:
        """What will be touched: hooks, interventions, rows and tokens.

        Example:
            >>> from persona_lens.steering import plan
            >>> print(plan(model, pl.add(v, layer=5, strength=1.5)).explain())
            hooks: blocks.5.hook_resid_post
            every row:
              add optimism at blocks.5.hook_resid_post (strength 1.5), response
        """
        lines: list[str] = []
        for number, chosen in enumerate(self.sets):
            rows = "every row" if self.by_row is None else f"{sum(s == number for s in self.by_row)} rows"
            what = [f"  {x}{' - left out, dose 0' if x.dose == 0.0 else ''}" for x in chosen] or ["  unsteered"]
            lines += [f"{rows}:", *what]
        hooks = ", ".join(self.model.hook_name(layer) for layer in self.layers) or "none"
        return "\n".join([f"hooks: {hooks}", *lines])

    def hooks(self) -> list[tuple[str, Any]]:
        """The hooks, for `bridge.run_with_hooks` and the like. (`steer` also reads masks of your own forward passes.)"""
        return [(self.model.hook_name(layer), _LayerHook(self, layer)) for layer in self.layers]

    def prefill_key(self, row: int) -> Hashable:
        """Rows may share a prefill where the same things touch their prompts."""
        number = self.set_of(row)
        return number if any(x.touches_prompt for x in self.live[number]) else None

    def set_of(self, row: int) -> int:
        """The number of a row's set."""
        return 0 if self.by_row is None else self.by_row[row]

    def sets_of(self, rows: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The set of each row of a pass."""
        return torch.zeros_like(rows) if self._numbers is None else self._numbers[rows]

    @cached_property
    def _numbers(self) -> Int[Tensor, " row"] | None:
        return None if self.by_row is None else torch.tensor(self.by_row, device=self.model.device)

    @contextmanager
    def active(self) -> Generator["Plan"]:
        """Steer every forward pass inside; undone after it, also after an exception."""
        with ExitStack() as stack:
            stack.enter_context(row_aware(self))
            stack.enter_context(reading_calls(self.model, self.receipt.count))
            stack.enter_context(self.model.hooks(self.hooks()))
            yield self


def plan(model: ChatModel, *interventions: Intervention | Iterable[Intervention]) -> Plan:
    """Check interventions against a model: layer, width, lineage, bands.

    Raises:
        SteeringError: what does not fit, before anything runs.
        LineageError: a vector of another lineage.

    Example:
        >>> from persona_lens.steering import plan
        >>> ready = plan(model, pl.add(v, layer=5, strength=1.5), pl.cap(v, layer=6, ceiling=100.0))
        >>> ready.layers
        [5, 6]
        >>> with ready.active():
        ...     answer = model.chat("How should I handle my dog?", temperature=0.0)
        >>> ready.receipt.tokens[5] == ready.receipt.tokens[6]
        True
    """
    flat: list[Intervention] = []
    for one in interventions:
        flat += [one] if isinstance(one, Intervention) else list(one)
    return Plan(model, (tuple(flat),))


def steer(model: ChatModel, *interventions: Intervention | Iterable[Intervention]) -> AbstractContextManager[Plan]:
    """Steer everything the model does inside the `with`: `chat`, `generate`, `sample`, your own forward passes, training.

    Raises:
        SteeringError, LineageError: as `plan`, before anything runs.

    Example:
        >>> with pl.steer(model, pl.add(v, layer=5, strength=2.0)) as plan:
        ...     print(model.chat("How should I handle my dog?", temperature=0.0))
        Start early and confidently celebrate the dog.
        >>> print(plan.receipt)
        15 forward passes; blocks.5.hook_resid_post: 14 tokens
    """
    return plan(model, *interventions).active()


def row_plan(model: ChatModel, rows: Sequence[Sequence[Intervention]]) -> Plan:
    """A plan with its own interventions for each row of a `sample` call (row i of the call gets `rows[i]`).

    Raises:
        SteeringError, LineageError: as `plan`.
    """
    places: dict[tuple[int, ...], int] = {}
    sets: list[tuple[Intervention, ...]] = []
    by_row: list[int] = []
    for chosen in rows:
        key = tuple(id(x) for x in chosen)
        if key not in places:
            places[key] = len(sets)
            sets.append(tuple(chosen))
        by_row.append(places[key])
    return Plan(model, tuple(sets), tuple(by_row))


def _check(model: ChatModel, one: Intervention) -> None:
    if not 0 <= one.layer < model.n_layers:
        raise SteeringError(f"{one.name}: layer {one.layer} does not exist: {model.name} has layers 0 to {model.n_layers - 1}")
    for what, direction in (("vector", one.direction), ("gate", one.gate.unit if one.gate else one.direction)):
        if direction.shape != (model.d_model,):
            raise SteeringError(
                f"{one.name}: the {what} has {direction.numel()} dimensions, {model.name} has {model.d_model}: "
                "extract it on this model"
            )
    if one.lineage and one.lineage != model.fingerprint.lineage:
        raise LineageError(
            f"{one.name}: the vector is of lineage {one.lineage}, {model.name} is of lineage {model.fingerprint.lineage}: "
            "extract it again on this model"
        )


def _check_bands(chosen: Sequence[Intervention]) -> None:
    """Bands of one layer are solved jointly, so they need one strength, and something must satisfy them all."""
    for layer in {x.layer for x in chosen}:
        here = [x for x in chosen if x.layer == layer and isinstance(x.act, Band)]
        if len({cast(Band, x.act).strength for x in here}) > 1:
            raise SteeringError(
                f"bands at {hook_name(layer)} are solved together and need one strength: {', '.join(map(str, here))}"
            )
        for kind in (Rotate, Custom):
            same = [x for x in chosen if x.layer == layer and isinstance(x.act, kind)]
            if len(same) > 1:
                raise SteeringError(
                    f"two {kind.__name__.lower()} interventions at {hook_name(layer)} depend on their order: keep one of "
                    f"{', '.join(map(str, same))}"
                )
        if here:
            units, low, high = _bands(here, torch.device("cpu"))
            require_feasible(units, low, high, [str(x) for x in here])


def _bands(
    here: Sequence[Intervention], device: torch.device
) -> tuple[Float[Tensor, "band d_model"], Float[Tensor, " band"], Float[Tensor, " band"]]:
    acts = [cast(Band, x.act) for x in here]
    units = torch.stack([x.direction.double() / x.direction.double().norm() for x in here]).to(device)
    low, high = (torch.tensor([getattr(a, side) for a in acts], dtype=torch.float64, device=device) for side in ("low", "high"))
    return units, low, high


class _LayerHook:
    """The hook of one layer: reads the pass, then applies every set to its own rows."""

    def __init__(self, owner: Plan, layer: int) -> None:
        self.plan, self.layer = owner, layer
        self.sets = [tuple(x for x in chosen if x.layer == layer) for chosen in owner.live]
        # sums without a gate at one `where` are the common case: one delta per set, added in one go
        self.simple = all(isinstance(x.act, Add) and x.gate is None and isinstance(x.where, str) for s in self.sets for x in s)
        self._deltas: dict[str, tuple[Float[Tensor, "set d_model"], Bool[Tensor, " set"]]] = {}

    def __call__(self, residual: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        content = content_of(residual)
        numbers = self.plan.sets_of(content.rows).to(residual.device)
        if self.simple:
            return self._add(residual, content, numbers)
        out = residual
        for number, chosen in enumerate(self.sets):
            rows = (numbers == number).nonzero().squeeze(-1)
            if chosen and len(rows):
                changed = self._apply(residual[rows], _rows_of(content, rows), rows, chosen)
                out = out.index_copy(0, rows, changed)
        return out

    def _add(self, residual: Tensor, content: "Pass | Unspecified", numbers: Int[Tensor, " batch"]) -> Tensor:
        """Sums by `where`: rows without a dose get their residual back bit for bit."""
        for where, (deltas, dosed) in self.deltas(residual).items():
            mask = _tokens(content, where) & dosed[numbers][:, None]
            self.plan.receipt.update(self.layer, mask)
            residual = torch.where(mask[..., None], residual + deltas[numbers][:, None], residual)
        return residual

    def deltas(self, residual: Tensor) -> dict[str, tuple[Float[Tensor, "set d_model"], Bool[Tensor, " set"]]]:
        """Per `where`, the sum of what each set adds (summed in fp64, cast once) and which sets add anything."""
        if not self._deltas:
            for where in sorted({cast(str, x.where) for chosen in self.sets for x in chosen}):
                sums = torch.zeros(len(self.sets), residual.shape[-1], dtype=torch.float64)
                for number, chosen in enumerate(self.sets):
                    for x in chosen:
                        if x.where == where:
                            sums[number] += cast(Add, x.act).strength * x.direction.double().cpu()
                self._deltas[where] = (sums.to(residual.device, residual.dtype), (sums != 0).any(-1).to(residual.device))
        return self._deltas

    def _apply(self, residual: Tensor, content: "Pass | Unspecified", rows: Tensor, chosen: Sequence[Intervention]) -> Tensor:
        """All interventions of one set: sums, rotation, bands, custom - each on its own tokens, gates read from the input."""
        before = residual.float()
        h = before
        touched = torch.zeros(residual.shape[:2], dtype=torch.bool, device=residual.device)
        masks = {id(x): self._mask(x, before, content, rows) for x in chosen}
        for x in chosen:
            touched |= masks[id(x)]
        order = (Add, Rotate, Band, Custom)
        for kind in order:
            same = [x for x in chosen if type(x.act) is kind]
            h = self._banded(h, same, masks) if kind is Band else self._one_by_one(h, same, masks)
        self.plan.receipt.update(self.layer, touched)
        return torch.where(touched[..., None], h.to(residual.dtype), residual)

    @staticmethod
    def _mask(x: Intervention, before: Tensor, content: "Pass | Unspecified", rows: Tensor) -> Bool[Tensor, "batch position"]:
        mask = _tokens(content, x.where[rows.to(x.where.device)] if isinstance(x.where, Tensor) else x.where)
        return mask if x.gate is None else mask & (before @ x.gate.unit.to(before.device, before.dtype) > x.gate.above)

    @staticmethod
    def _one_by_one(h: Tensor, same: Sequence[Intervention], masks: dict[int, Tensor]) -> Tensor:
        total = torch.zeros_like(h)
        for x in same:
            v = x.direction.to(h.device, h.dtype)
            match x.act:
                case Add(strength):
                    change = (strength * v).expand_as(h)
                case Rotate(degrees):
                    change = rotated(h, v, degrees) - h
                case Custom(function, strength):
                    change = strength * (function(h, v) - h)
                case Band():
                    continue
            total = torch.where(masks[id(x)][..., None], total + change, total)
        return h + total if same else h

    @staticmethod
    def _banded(h: Tensor, same: Sequence[Intervention], masks: dict[int, Tensor]) -> Tensor:
        """Tokens are grouped by which bands apply to them; each group is solved jointly."""
        if not same:
            return h
        applies = torch.stack([masks[id(x)] for x in same], -1)  # batch position band
        h = h.clone()
        for pattern in torch.unique(applies.reshape(-1, len(same)), dim=0):
            if not bool(pattern.any()):
                continue
            here = [x for x, on in zip(same, pattern.tolist(), strict=True) if on]
            tokens = (applies == pattern).all(-1)
            units, low, high = _bands(here, h.device)
            h[tokens] += cast(Band, here[0].act).strength * smallest_change(h[tokens], units, low, high)
        return h


def _tokens(content: "Pass | Unspecified", where: Any) -> Bool[Tensor, "batch position"]:
    """Which tokens of a pass a `where` touches; padding never."""
    if isinstance(where, Tensor):
        if where.shape != content.real.shape:
            raise SteeringError(f"the mask has shape {tuple(where.shape)}, the forward pass {tuple(content.real.shape)}")
        return where.to(content.real.device) & content.real
    match where:
        case "everywhere":
            return content.real
        case "prompt":
            return content.prompt
        case "responses":
            if content.earlier is None:
                raise SteeringError(
                    "where='responses' needs to know where the earlier answers are: give messages instead of token ids, or "
                    "spans with `earlier`, or use where='response'"
                )
            return content.response | content.earlier()
        case _:
            return content.response


def _rows_of(content: "Pass | Unspecified", rows: Int[Tensor, " chosen"]) -> "Pass | Unspecified":
    if isinstance(content, Unspecified):
        return Unspecified(content.rows[rows], content.real[rows])
    found = content.earlier
    earlier = None if found is None else lambda: found()[rows]
    return Pass(content.rows[rows], content.real[rows], content.prompt[rows], content.response[rows], earlier)


@dataclass(frozen=True, eq=False)
class _Call:
    """What a forward pass of the model was called with, as far as it says which tokens are which."""

    mask: Tensor | None
    cached: int | None  # tokens in its cache; None where it neither has nor asks for one, so that nothing is being generated


_CALL: ContextVar[_Call | None] = ContextVar("steered_call", default=None)


@contextmanager
def reading_calls(model: ChatModel, called: Callable[[], object]) -> Generator[None]:
    """Keep what the model is called with while it runs, for `content_of`; `called` is told of every call."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        cache = cache_given(kwargs)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        generating = cache is not None or kwargs.get("use_cache") is True
        cached = (0 if cache is None else int(cache.get_seq_length())) if generating else None
        _CALL.set(_Call(mask if isinstance(mask, Tensor) else None, cached))
        called()

    handle = model.hf.register_forward_pre_hook(before, with_kwargs=True)
    token = _CALL.set(None)
    try:
        yield
    finally:
        handle.remove()
        _CALL.reset(token)


def content_of(residual: Tensor) -> "Pass | Unspecified":
    """What the running pass holds: as its runner says, else as its attention mask and cache say.

    Args:
        residual: of the running pass, [batch, position, d_model].

    Raises:
        SteeringError: an attention mask that is not [batch, position].
    """
    said = current_pass()
    if said is not None:
        return said
    call = _CALL.get()
    batch, width = residual.shape[:2]
    real = torch.ones(batch, width, dtype=torch.bool, device=residual.device)
    if call is not None and call.mask is not None:
        if call.mask.ndim != 2:
            raise SteeringError(f"the attention mask must be [batch, position], not {call.mask.ndim}-dimensional")
        real = call.mask[:, -width:].bool().to(residual.device)
    rows = torch.arange(batch, device=residual.device)
    if call is None or call.cached is None:
        return Unspecified(rows, real)
    if call.cached and width == 1:
        return Pass(rows, real, torch.zeros_like(real), real, lambda: torch.zeros_like(real))
    last = real & (real.long().flip(-1).cumsum(-1).flip(-1) == 1)
    return Pass(rows, real, real, last)


class Unspecified:
    """A full pass without spans: where the answer begins is not known and never guessed.

    Attributes:
        rows: what the rows are called.
        real: which tokens are no padding.
    """

    def __init__(self, rows: Int[Tensor, " batch"], real: Bool[Tensor, "batch position"]) -> None:
        self.rows, self.real = rows, real

    @property
    def prompt(self) -> Any:
        """Not known; `response` and `earlier` are not either.

        Raises:
            SteeringError: always (says what to give instead).
        """
        raise SteeringError(
            "this forward pass does not say where the answer begins: give its spans (`forward_pass(span_pass(...))`), "
            "or use where='everywhere' or a mask"
        )

    response = earlier = prompt
