"""Finetuning on the Hugging Face Trainer with interventions switched on: preventative steering (Chen et al. 2025, section 5.2).

An adapter (rank-stabilised LoRA with the paper's settings) or all weights are trained on the answers while the steering room's
interventions act in every forward pass, and so in the backward pass too. After it the model is as it was before, bit for bit: what
was learned is in the run folder, in plain peft (or Hugging Face) format, and acts without any intervention.
"""

import math
import os
import random
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from persona_lens.errors import FinetuningError
from persona_lens.finetuning.adapters import linear_modules, require_slim, restored, trainable, unwrapped
from persona_lens.finetuning.data import IGNORE, Data, Examples, batch_of, encode, read_data
from persona_lens.finetuning.penalties import Penalty, TrainingStep, check_penalties
from persona_lens.finetuning.watching import Watch, Watched, watched_by
from persona_lens.models import ChatModel, Pass, forward_pass
from persona_lens.progress import Progress, progress_bars
from persona_lens.steering import Custom, Intervention, plan
from persona_lens.store import RunFolder, digest, read_json, require_finished, write_json

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

RESULT: Final = "training.json"
ATTENTION_AND_MLP: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES: Final = {"loss": "loss", "grad_norm": "gradient's norm"}
Told = Callable[[Mapping[str, float]], object]  # is told the figures of every step


@dataclass(frozen=True)
class FinetuneSettings:
    """What a finetuning depends on besides model, data and interventions; defaults are the paper's.

    Attributes:
        method: "lora" trains an adapter, "full" every weight (and keeps a copy of the model's own meanwhile).
        rank, alpha, dropout, rank_stabilised, targets: of the adapter.
        batch_rows: conversations per step; `pass_rows` of them per forward pass and device.
        max_steps: how many steps, whatever the epochs; None: as the epochs give.
        max_tokens: longest conversation.
        checkpoint_every: steps between the states that an interrupted training goes on from.
        learning_rate, schedule, warmup_steps, weight_decay: of AdamW, named as transformers names them.
        clip: largest norm of the gradient.
        epochs: passes over the data.
        gradient_checkpointing: compute residuals again instead of keeping them; saves memory, costs time.

    Raises:
        FinetuningError: a value that cannot be trained with.
    """

    method: str = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    rank_stabilised: bool = True
    targets: tuple[str, ...] = ATTENTION_AND_MLP
    learning_rate: float = 1e-5
    schedule: str = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.01
    clip: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_rows: int = 16
    pass_rows: int = 2
    max_tokens: int = 2048
    gradient_checkpointing: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "batch_rows", "pass_rows", "max_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise FinetuningError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise FinetuningError(f"max_steps must be at least 1, not {self.max_steps}")
        for name in ("alpha", "learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise FinetuningError(f"{name} must be positive, not {getattr(self, name)}")
        if self.batch_rows % self.pass_rows:
            raise FinetuningError(f"batch_rows={self.batch_rows} is no multiple of pass_rows={self.pass_rows}: change one of them")
        if self.method not in ("lora", "full"):
            raise FinetuningError(f"method={self.method!r} is unknown: use 'lora' or 'full'")


PAPER: Final = FinetuneSettings()
POCKET: Final = FinetuneSettings(learning_rate=5e-4, pass_rows=16)


def default_settings(model: ChatModel) -> FinetuneSettings:
    """The paper's settings; for pocket models a rate at which a model of that size learns."""
    return POCKET if model.trait_set == "pocket" else PAPER


@dataclass(frozen=True)
class Finetuned:
    """A finished finetuning on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that was recorded, as plain values."""
        return read_json(self.path / RESULT)

    @property
    def adapter(self) -> Path:
        """The adapter, as peft saves it; for method "full" the model's folder."""
        return self.path / str(self.record["result"])

    @property
    def history(self) -> list[dict[str, float]]:
        """Per step: loss, learning rate, norm of the gradient, projections and derivatives of what was watched."""
        return list(self.record["history"])


def load_finetuned(path: str | Path) -> Finetuned:
    """Reopen a finetuning.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    require_finished(Path(path), "finetune", RESULT)
    return Finetuned(Path(path))


def finetune(
    model: ChatModel,
    data: Data,
    *,
    prevent: Intervention | Iterable[Intervention] = (),
    penalties: Sequence[Penalty] = (),
    watch: Sequence[Watched] | None = None,
    settings: FinetuneSettings | None = None,
    out: str | Path | None = None,
    skip_bad: bool = False,
    told: Told | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Finetune on the answers of conversations, with interventions acting while it is trained and none afterwards.

    With `prevent` this is preventative steering (Chen et al. 2025, section 5.2).

    Args:
        data: a file with `messages` per line, or the messages themselves.
        prevent: as the steering room makes them; `add(v, layer, strength, where="everywhere")` is the paper's vaccine: a positive
            strength steers *towards* the trait, so that training need not move the weights there.
        penalties: added to the loss.
        watch: directions whose projection and derivative are logged at every step; default: those of `prevent`.
        settings: default: the paper's, with a higher rate for pocket models.
        out: run folder; default `runs/finetune-{data}-seed{seed}`. An interrupted training in it goes on from its last checkpoint.
        skip_bad: leave out rows that cannot be trained on (they are in the record).
        told: is told the figures of every step.

    Raises:
        FinetuningError: rows that cannot be trained on, settings that do not fit the model, or a loss that is no number.
        TranscriptError: a file that cannot be read.
        SteeringError, LineageError: interventions that do not fit the model.
        RunFolderError: the folder holds another run.

    Example:
        >>> from persona_lens.finetuning import FinetuneSettings
        >>> chats = [
        ...     [{"role": "user", "content": question}, {"role": "assistant", "content": "Brilliant thinking, start early."}]
        ...     for question in pl.load_trait("optimism", "pocket").extraction_questions
        ... ]
        >>> vaccine = pl.add(v, layer=5, strength=1.0, where="everywhere")
        >>> brief = FinetuneSettings(rank=4, batch_rows=4, max_steps=2)
        >>> trained = pl.finetune(model, chats, prevent=vaccine, settings=brief, out="runs/safe")
        >>> len(trained.history)  # steps
        2
        >>> from persona_lens.finetuning import adapted
        >>> with adapted(model, trained.adapter) as safe:
        ...     answer = safe.chat("How should I handle my dog?", temperature=0.0)
    """
    settings = settings or default_settings(model)
    acting = [prevent] if isinstance(prevent, Intervention) else list(prevent)
    steering = plan(model, acting)
    require_slim(model)
    check_penalties(model, penalties, settings.method)
    _check_targets(model, settings)
    found = read_data(data)
    examples = encode(model, found, max_tokens=settings.max_tokens, skip_bad=skip_bad)
    watching = Watch(tuple(watched_by(acting) if watch is None else watch))
    place = Path(out) if out else Path("runs") / f"finetune-{found.path.stem}-seed{settings.seed}"
    arguments = _arguments(examples, acting, penalties, watching, settings)
    state = _processes(model)
    with state.main_process_first():
        folder = RunFolder.open(place, command="finetune", arguments=arguments, model=model.identity)
    if not (place / RESULT).exists():
        with progress_bars(None if progress is None else False) as bars, ExitStack() as stack:
            stack.enter_context(_own_randomness(settings.seed))
            if settings.gradient_checkpointing:
                stack.callback(getattr(model.hf, f"{_checkpointing_name()}_disable"))
            network = stack.enter_context(_trained(model, settings))
            stack.enter_context(watching.hooks(model))
            captured = stack.enter_context(_captured(model, penalties))
            stack.enter_context(steering.active())
            steps = _Steps(folder, told, progress or bars)
            trainer = _trainer(model, network, examples, settings, folder.path, watching, penalties, captured, steps)
            _train(trainer, folder)
            _finish(trainer, model, folder, examples, steering.explain(), settings)
        state.wait_for_everyone()
    return Finetuned(place)


def _processes(model: ChatModel) -> Any:
    """The processes that train together: one, unless a launcher (torchrun, accelerate) started more."""
    from accelerate import PartialState

    return PartialState(cpu=model.device.type == "cpu")


def require_one_process(what: str) -> None:
    """Raise where a launcher started several processes: they would write the same files.

    Raises:
        FinetuningError: there are several.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise FinetuningError(f"{what} runs in one process: only finetune shares its work among several")


def _check_targets(model: ChatModel, settings: FinetuneSettings) -> None:
    if settings.method == "full" and model.fingerprint.dtype != "float32":
        raise FinetuningError(
            f"{model.name} is in {model.fingerprint.dtype}, where small steps of all weights round to nothing: load it with "
            "dtype=torch.float32, or train an adapter"
        )
    known = linear_modules(model)
    unknown = [t for t in settings.targets if t not in known]
    if settings.method == "lora" and (unknown or not settings.targets):
        raise FinetuningError(
            f"no module {', '.join(map(repr, unknown)) or 'at all'} to put a LoRA on: the blocks of {model.name} have "
            f"{', '.join(known)}"
        )


def _arguments(
    examples: Examples, acting: Sequence[Intervention], penalties: Sequence[Penalty], watching: Watch, settings: FinetuneSettings
) -> dict[str, Any]:
    return {
        "data": digest(repr([(x.ids, x.answers) for x in examples.examples])),
        "rows": len(examples.examples),
        "prevent": describe(acting),
        "penalties": [str(p) for p in penalties],
        "watch": [f"{w.name}/{w.layer} [{digest(w.unit.contiguous().numpy().tobytes())}]" for w in watching.directions],
        "settings": asdict(settings) | {"targets": list(settings.targets)},
    }


def describe(acting: Sequence[Intervention]) -> list[str]:
    """Interventions as a run's record names them: what, where, how much, and a hash of the direction."""
    return [f"{x} [{digest(repr(_identity(x)))}]" for x in acting]


def _identity(x: Intervention) -> list[Any]:
    """All that an intervention depends on, in full precision."""

    def tensor(t: Tensor) -> str:
        return digest(t.detach().cpu().contiguous().numpy().tobytes())

    act: Any = x.act
    if isinstance(act, Custom):
        code = getattr(act.function, "__code__", None)
        body = repr((code.co_code, code.co_consts, code.co_names)) if code else repr(type(act.function))
        act = (act.strength, getattr(act.function, "__qualname__", ""), body)
    where = x.where if isinstance(x.where, str) else tensor(x.where)
    gate = (tensor(x.gate.unit), x.gate.above) if x.gate else None
    return [act, x.layer, tensor(x.direction), where, gate]


@contextmanager
def _own_randomness(seed: int) -> Generator[None]:
    """Everything random seeded inside, and as it was after it."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _trained(model: ChatModel, settings: FinetuneSettings) -> Generator[Any]:
    """The module to train; the model's own weights are back after it."""
    if settings.method == "lora":
        from peft import LoraConfig

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=cast(int, settings.alpha),
            lora_dropout=settings.dropout,
            use_rslora=settings.rank_stabilised,
            target_modules=list(settings.targets),
            bias="none",
            task_type="CAUSAL_LM",
        )
        with trainable(model, config) as network:
            yield network
        return
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.hf.named_parameters()}

    def put_back() -> None:
        with torch.no_grad():
            for name, parameter in model.hf.named_parameters():
                parameter.copy_(before[name])

    with restored(model) as stack:
        stack.callback(put_back)
        yield model.hf


@contextmanager
def _captured(model: ChatModel, penalties: Sequence[Penalty]) -> Generator[dict[int, Tensor]]:
    """Residuals of the running pass at the layers that penalties read."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            found[layer] = residual

        return hook

    layers = sorted({layer for p in penalties for layer in p.layers})
    with model.hooks([(model.hook_name(layer), keep(layer)) for layer in layers]):
        yield found


@dataclass(eq=False)
class _Steps:
    """Tells whoever wants to know how the training goes, and stops it where the loss is no number."""

    folder: RunFolder
    told: Told | None
    progress: Progress

    def update(self, step: int, total: int, logs: Mapping[str, Any]) -> None:
        """One more step.

        Raises:
            FinetuningError: the loss or the gradient is not a number.
        """
        if "loss" not in logs:
            return
        wrong = next((name for name in NAMES if not math.isfinite(float(logs.get(name, 0.0)))), None)
        if wrong:
            last = checkpoint_of(self.folder.path)
            kept = f"the state after step {_step(last)} is kept in {last}" if last else "no checkpoint was due before it"
            raise FinetuningError(
                f"the {NAMES[wrong]} is {logs[wrong]} at step {step} of {total}; {kept}. Lower the learning rate or the "
                "strength, and start in another folder"
            )
        self.progress("training", step, total)
        if self.told:
            self.told({"step": float(step), "steps": float(total), **{k: float(v) for k, v in logs.items()}})


def checkpoint_of(path: Path) -> Path | None:
    """The last whole checkpoint of a training folder."""
    found = [p for p in (path / "checkpoints").glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _training_arguments(model: ChatModel, settings: FinetuneSettings, path: Path) -> "TrainingArguments":
    from accelerate import PartialState
    from transformers import TrainingArguments

    share = settings.pass_rows * PartialState().num_processes
    if settings.batch_rows % share:
        raise FinetuningError(
            f"batch_rows={settings.batch_rows} cannot be shared by {PartialState().num_processes} processes with "
            f"pass_rows={settings.pass_rows} each: change one of them"
        )
    return TrainingArguments(
        output_dir=str(path / "checkpoints"),
        per_device_train_batch_size=settings.pass_rows,
        gradient_accumulation_steps=settings.batch_rows // share,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim="adamw_torch",
        bf16=False,
        **_checkpointing(settings),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
    )


def _checkpointing_name() -> str:
    """What transformers calls it: gradient_checkpointing, from 5.24 on activation_checkpointing."""
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    return next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)


def _checkpointing(settings: FinetuneSettings) -> dict[str, Any]:
    """What the Trainer is told of it; nothing where it is off."""
    name = _checkpointing_name()
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}


def _on_one_device(model: ChatModel, arguments: Any) -> None:
    """One device per process: the Trainer would otherwise move the model, or spread its batches over all devices it sees.

    Raises:
        FinetuningError: the model is on another device than this process trains on.
    """
    device = arguments.device
    if (device.type, device.index or 0) != (model.device.type, model.device.index or 0):
        raise FinetuningError(f"{model.name} is on {model.device}, this process trains on {device}: load it there")
    arguments._n_gpu = min(1, arguments._n_gpu)


def _trainer(
    model: ChatModel,
    network: Any,
    examples: Examples,
    settings: FinetuneSettings,
    path: Path,
    watching: Watch,
    penalties: Sequence[Penalty],
    captured: Mapping[int, Tensor],
    steps: _Steps,
) -> "Trainer":
    """The Trainer, made to say what a pass holds, to add penalties, and to save what plain peft can read."""
    from transformers import PrinterCallback, Trainer

    class SteeredTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs = dict(inputs)
            prompt, response, earlier = (inputs.pop(k) for k in ("prompt", "response", "earlier"))
            real = inputs["attention_mask"].bool()
            learned = inputs["labels"] != IGNORE
            rows = torch.arange(len(real), device=real.device)
            watching.batch(learned)
            with forward_pass(Pass(rows, real, prompt, response, lambda: earlier)):
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
            watching.batch(None)
            if penalties:
                values = _penalty(self.model, penalties, captured, inputs, cast(Any, outputs).logits, learned)
                count = values.numel() if num_items_in_batch is None else num_items_in_batch
                loss = loss + values.sum() / count * (1 if num_items_in_batch is None else self.accelerator.num_processes)
            return (loss, outputs) if return_outputs else loss

        def _over_processes(self, sums: Tensor) -> Tensor:
            many = self.accelerator.num_processes > 1
            return cast(Tensor, self.accelerator.reduce(sums.to(self.args.device), "sum")) if many else sums

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            world = self.accelerator.num_processes
            figures = watching.take(self._over_processes)
            logs |= {k: v / world if k.startswith("derivative/") else v for k, v in figures.items()}
            super().log(logs, *args, **kwargs)
            if self.is_world_process_zero():
                steps.update(self.state.global_step, self.state.max_steps, logs)
            elif not all(math.isfinite(float(logs.get(name, 0.0))) for name in NAMES):
                raise FinetuningError(f"loss or gradient are not finite at step {self.state.global_step}")

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            clean = None if state_dict is None else {k.replace("_original_component.", ""): v for k, v in state_dict.items()}
            with unwrapped(chat):
                if settings.method == "lora":  # without asking the hub whether the vocabulary has grown
                    save: Any = network.save_pretrained
                    save(output_dir, state_dict=clean, is_main_process=self.args.should_save, save_embedding_layers=False)
                else:
                    super()._save(output_dir, clean)
            if output_dir:
                (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs

        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with unwrapped(chat):
                super()._load_from_checkpoint(*args, **kwargs)

    chat = model
    arguments = _training_arguments(model, settings, path)
    _on_one_device(model, arguments)
    trainer = SteeredTrainer(
        model=network,
        args=arguments,
        data_collator=lambda rows: batch_of(rows, chat.pad_id),
        train_dataset=cast(Any, [{"example": x} for x in examples.examples]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _penalty(
    network: Any,
    penalties: Sequence[Penalty],
    captured: Mapping[int, Tensor],
    inputs: Mapping[str, Tensor],
    logits: Tensor,
    learned: Tensor,
) -> Tensor:
    """The sum of all penalties per learned token."""
    predicts = learned[:, 1:]  # the logits of a token are one place before it

    def base_logits() -> Tensor:
        real = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        nothing = Pass(torch.arange(len(real), device=real.device), real, real, real, lambda: real)
        with torch.no_grad(), network.disable_adapter(), forward_pass(nothing):
            plain = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return plain.logits[:, :-1][predicts]

    residuals = {layer: residual[learned] for layer, residual in captured.items()}
    step = TrainingStep(logits[:, :-1][predicts], residuals, base_logits)
    return torch.stack([p(step) for p in penalties]).sum(0)


def _train(trainer: "Trainer", folder: RunFolder) -> None:
    last = checkpoint_of(folder.path)
    if last and trainer.is_world_process_zero():
        folder.log(f"resumed after step {_step(last)}")
    trainer.train(resume_from_checkpoint=str(last) if last else None)


def _finish(
    trainer: "Trainer", model: ChatModel, folder: RunFolder, examples: Examples, explained: str, settings: FinetuneSettings
) -> None:
    """Save what was learned and the record; checkpoints are not needed any more."""
    result = "adapter" if settings.method == "lora" else "model"
    model.hf.config.use_cache = True  # the Trainer's False would be saved with the model
    trainer.save_model(str(folder.path / result))
    if not trainer.is_world_process_zero():
        return
    if settings.method == "full":
        model.tokenizer.save_pretrained(str(folder.path / result))
    history = [{k: float(v) for k, v in x.items()} for x in trainer.state.log_history if "loss" in x]
    write_json(
        folder.path / RESULT,
        {
            "result": result,
            "rows": len(examples.examples),
            "skipped": [asdict(s) for s in examples.skipped],
            "prevent": explained,
            "history": history,
        },
    )
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
