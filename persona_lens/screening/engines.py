"""Where shards are scored: in this process, or by Ray Data on many (`map_batches`, one model per actor).

The same recipe runs everywhere and hands back finished files, so that where it ran shows nowhere. What a worker dies over is scored
again by another: Ray restarts the actor.
"""

import logging
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from persona_lens.errors import ScreeningError
from persona_lens.models import ChatModel, load_model
from persona_lens.screening.files import Files, answers_of, files_of
from persona_lens.screening.scoring import Recipe
from persona_lens.screening.sources import Shard


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


def local(model: ChatModel, recipe: Recipe, work: Sequence[Work]) -> Iterator[tuple[int, Files]]:
    """One shard after the other, in this process."""
    for one in work:
        yield one.key, one(model, recipe)


def on_ray(
    workers: int = 2,
    *,
    address: str | None = None,
    cpus: int = 1,
    gpus: float = 0.0,
    load: Callable[[], ChatModel] | None = None,
) -> Engine:
    """Score on Ray, every actor with a model of its own.

    Workers read the data at the path that was given, so all machines must see it there.

    Args:
        workers: actors.
        address: of a running cluster ("auto" finds one); default: a local one, on the loopback interface, for as long as it takes.
        cpus: of each actor, which are its torch threads too. Scores are bit-identical for the same number of threads.
        gpus: of each actor.
        load: how a worker loads the model; default: by the name of the model at hand, with its dtype.

    Raises:
        ScreeningError: Ray is not installed, or there is not one worker.
    """
    if workers < 1 or cpus < 1:
        raise ScreeningError(f"screening on Ray needs 1 or more workers with 1 or more cpus each, not {workers} with {cpus}")
    try:
        import ray  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ScreeningError("screening on Ray needs ray: pip install 'persona-lens[screen]'") from error

    def engine(model: ChatModel, recipe: Recipe, work: Sequence[Work]) -> Iterator[tuple[int, Files]]:
        how = load or partial(load_model, model.name, dtype=model.fingerprint.dtype, device="cuda" if gpus else "cpu")
        with _cluster(address, workers * cpus):
            yield from _mapped(work, {"load": how, "recipe": recipe, "model": model, "threads": cpus}, workers, cpus, float(gpus))

    return engine


@contextmanager
def _cluster(address: str | None, cpus: int) -> Generator[None]:
    """The cluster that is there, or one for the time being."""
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = {} if address else {"num_cpus": cpus + 1, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        ray.shutdown()


def _mapped(work: Sequence[Work], worker: dict[str, Any], workers: int, cpus: int, gpus: float) -> Iterator[tuple[int, Files]]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"key": one.key, "work": pickle.dumps(one)} for one in work]
    model = worker.pop("model")
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_kwargs={**worker, "identity": model.identity, "system": model.system},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in made.iter_rows():
        yield int(row["key"]), Files(row["table"], row["sums"])


class _Worker:
    """An actor: loads the model once, then scores shard after shard."""

    def __init__(
        self, load: Callable[[], ChatModel], recipe: Recipe, identity: dict[str, Any], system: str | None, threads: int
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model, self.recipe = replace(load(), system=system), recipe
        if self.model.identity != identity:
            raise ScreeningError(f"a worker loaded another model ({self.model.identity}) than is at hand ({identity}): pass load=")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        work: Work = pickle.loads(bytes(batch["work"][0]))
        files = work(self.model, self.recipe)
        return {"key": batch["key"], "table": np.array([files.table], dtype=object), "sums": np.array([files.sums], dtype=object)}
