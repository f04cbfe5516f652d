"""Where shards are scored: in this process, or by Ray Data on many (`map_batches`, one model per actor).

The same recipe runs everywhere and hands back finished files, so that where it ran shows nowhere. What a worker dies over is scored
again by another: Ray restarts the actor.
"""

import logging
import pickle
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from persona_lens.errors import PersonaLensError, ScreeningError
from persona_lens.models import ChatModel, load_model
from persona_lens.screening.files import Files, answers_of, files_of
from persona_lens.screening.scoring import Recipe
from persona_lens.screening.sources import Shard

RETRIES: Final = 3  # of a shard whose worker died


@dataclass(frozen=True)
class Work:
    """A shard to score: its number among the work, its rows, its file's header, and a file with own answers that are there."""

    key: int
    shard: Shard
    header: str
    known: Path | None = None

    def __call__(self, model: ChatModel, recipe: Recipe) -> Files:
        known = answers_of(self.known) if self.known else None
        return files_of(recipe(model, self.shard.read(), known), self.header)


Engine = Callable[[ChatModel, Recipe, Sequence[Work]], Iterator[tuple[int, Files]]]
"""Scores shards of data: `local`, what `on_ray` gives, or your own."""


def local(model: ChatModel, recipe: Recipe, work: Sequence[Work]) -> Iterator[tuple[int, Files]]:
    """One shard after the other, in this process."""
    for one in work:
        yield one.key, one(model, recipe)


def on_ray(
    workers: int = 2,
    *,
    address: str | None = None,
    cpus: int = 1,
    gpus: float | None = None,
    load: Callable[[], ChatModel] | None = None,
) -> Engine:
    """Score on Ray, every actor with a model of its own.

    Workers read the data, and the own answers of another run, at the paths that were given: all machines must see them there.

    Args:
        workers: actors.
        address: of a running cluster ("auto" finds one); default: the one this process is connected to, or else a local one for as
            long as it takes.
        cpus: of each actor, which are its torch threads too. Scores are bit-identical for the same number of threads.
        gpus: of each actor; default: 1 where the model at hand is on a GPU, else 0.
        load: how a worker loads the model; default: by the name of the model at hand, with its dtype.

    Raises:
        ScreeningError: Ray is not installed, or there is not one worker. While it runs: the cluster cannot hold a worker, a worker
            failed (with its reason), or a shard killed its worker several times.
    """
    if workers < 1 or cpus < 1:
        raise ScreeningError(f"screening on Ray needs 1 or more workers with 1 or more cpus each, not {workers} with {cpus}")
    try:
        import ray  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ScreeningError("screening on Ray needs ray: pip install 'persona-lens[screen]'") from error

    def engine(model: ChatModel, recipe: Recipe, work: Sequence[Work]) -> Iterator[tuple[int, Files]]:
        each = float(gpus) if gpus is not None else float(model.device.type == "cuda")
        source = str(Path(model.name).absolute()) if Path(model.name).exists() else model.name
        how = load or partial(load_model, source, dtype=model.fingerprint.dtype, device="cuda" if each else "cpu")
        with _cluster(address, workers, cpus, each):
            yield from _mapped(work, _Loading(how, recipe, model.identity, model.system, cpus), workers, cpus, each)

    return engine


@contextmanager
def _cluster(address: str | None, workers: int, cpus: int, gpus: float) -> Generator[None]:
    """The cluster that is there, or one for the time being.

    Raises:
        ScreeningError: an address is given where the process is connected already, or no worker fits into the cluster.
    """
    import ray
    import ray.data

    there = ray.is_initialized()
    if there and address:
        raise ScreeningError(
            f"this process is connected to a Ray cluster already: leave address={address!r} out, or disconnect first"
        )
    if not there:
        local: dict[str, Any] = {} if address else {"num_cpus": workers * cpus + 1, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    log, context = logging.getLogger("ray.data"), ray.data.DataContext.get_current()
    before = log.level, context.enable_progress_bars
    log.setLevel(logging.ERROR)
    context.enable_progress_bars = False
    try:
        held = ray.cluster_resources()
        if held.get("CPU", 0) < cpus or held.get("GPU", 0) < gpus:
            raise ScreeningError(
                f"the Ray cluster has {held.get('CPU', 0):g} CPUs and {held.get('GPU', 0):g} GPUs: a worker takes {cpus}, {gpus:g}"
            )
        yield
    finally:
        log.setLevel(before[0])
        context.enable_progress_bars = before[1]
        if not there:
            ray.shutdown()


def _mapped(work: Sequence[Work], loading: "_Loading", workers: int, cpus: int, gpus: float) -> Iterator[tuple[int, Files]]:
    import ray.data
    from ray.exceptions import RayError

    items = [{"key": one.key, "work": pickle.dumps(one)} for one in work]
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_kwargs={"loading": loading},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=RETRIES,
        max_task_retries=RETRIES,
    )
    try:
        for row in made.iter_rows():
            if row["error"]:
                raise ScreeningError(row["error"])
            yield int(row["key"]), Files(row["table"], row["sums"])
    except RayError as error:
        plain = re.sub("\x1b[^m]*m", "", str(error))
        reason = next((line for line in plain.splitlines() if line.strip()), type(error).__name__)
        raise ScreeningError(
            f"Ray gave up ({reason}): what was finished is kept. Where a worker dies again and again, memory is the likely reason: "
            "give fewer workers, or shorter conversations (max_tokens)"
        ) from error


@dataclass(frozen=True)
class _Loading:
    """How a worker gets its model, and what it must be."""

    load: Callable[[], ChatModel]
    recipe: Recipe
    identity: dict[str, Any]
    system: str | None
    threads: int

    def __call__(self) -> ChatModel:
        import torch

        torch.set_num_threads(self.threads)
        model = replace(self.load(), system=self.system)
        if model.identity != self.identity:
            raise ScreeningError(f"a worker loaded another model ({model.identity}) than is at hand ({self.identity}): pass load=")
        return model


class _Worker:
    """An actor: loads the model once, then scores shard after shard. What goes wrong is handed back as a line."""

    def __init__(self, loading: _Loading) -> None:
        self.loading, self.model = loading, None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        work: Work = pickle.loads(bytes(batch["work"][0]))
        files, error = Files(b"", b""), ""
        try:
            self.model = self.model or self.loading()
            files = work(self.model, self.loading.recipe)
        except Exception as failure:  # handed to whoever started the run
            error = str(failure) if isinstance(failure, PersonaLensError) else f"{type(failure).__name__}: {failure}"
        return {"key": batch["key"], "table": _column(files.table), "sums": _column(files.sums), "error": _column(error)}


def _column(value: Any) -> Any:
    import numpy as np

    return np.array([value], dtype=object)
