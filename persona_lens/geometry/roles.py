"""Role vectors: the model plays many roles on the same questions; a role's vector is its mean answer minus the default assistant's.

Only answers judged fully in role count (3 on a scale 0-3). Question means are kept per role, so that contrasts such as the
Assistant Axis (default assistant - mean of the roles, arXiv 2601.10387) have error bars. A role is the unit of resume of the
residuals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from persona_lens.activations import DEFAULT_BATCH_TOKENS, pool, rollout_span
from persona_lens.errors import GeometryError, PersonaLensError, UnknownNameError
from persona_lens.extraction.run import read_rollouts, read_tensors
from persona_lens.geometry.axes import axis_of
from persona_lens.geometry.space import PersonaSpace, persona_space
from persona_lens.judges import Judged, RoleJudge, default_role_judge
from persona_lens.models import ChatModel, Sampling
from persona_lens.progress import Progress, progress_bars
from persona_lens.prompts import Prompt
from persona_lens.reliability import MINIMUM_QUESTIONS
from persona_lens.sampling import DEFAULT_BATCH_ROWS, Rollout, Row, sample
from persona_lens.store import (
    RunFolder,
    digest,
    read_json,
    read_jsonl,
    read_manifest,
    require_finished,
    write_atomically,
    write_json,
)
from persona_lens.traits import RoleSet, load_roles
from persona_lens.vectors import PersonaVectors

CHUNK_ROWS: Final = 256
DEFAULT: Final = "default assistant"
ASSISTANT_AXIS: Final = "assistant_axis"


@dataclass(frozen=True)
class RoleSettings:
    """What role vectors depend on besides roles, model and judge.

    Attributes:
        samples: answers per role and question (spread over the role's instructions).
        default_samples: answers per question without a system prompt; they are also the neutral residuals.
        least: adherence from which an answer counts, 0-3.

    Raises:
        GeometryError: a number out of range.
    """

    samples: int = 10
    default_samples: int = 25
    least: int = 3
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=300))
    seed: int = 0
    batch_rows: int = DEFAULT_BATCH_ROWS
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    def __post_init__(self) -> None:
        for name, least, most in (("samples", 1, None), ("default_samples", 1, None), ("least", 0, 3), ("batch_rows", 1, None)):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                raise GeometryError(f"{name} must be at least {least}{f' and at most {most}' if most else ''}, not {value}")


@dataclass(frozen=True)
class RoleRun:
    """Role vectors on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Everything that was counted, as plain values."""
        return read_json(self.path / "roles.json")

    @property
    def kept(self) -> list[str]:
        """Roles with vectors: answers in role on at least six questions."""
        return [r["name"] for r in self.summary["roles"] if r["questions"] >= MINIMUM_QUESTIONS]

    @property
    def adherence(self) -> dict[str, Int[np.ndarray, " grade"]]:
        """For every role, how many answers were judged 0, 1, 2 and 3."""
        return {r["name"]: np.array(r["adherence"]) for r in self.summary["roles"]}

    @cached_property
    def neutral(self) -> Float[Tensor, "sample layer d_model"]:
        """Response means of the default assistant's answers (those with tokens), in residual-stream units."""
        return self._default[self._default.isfinite().all(-1).all(-1)]

    @cached_property
    def default_means(self) -> Float[Tensor, "question layer d_model"]:
        """Question means of the default assistant."""
        return self._default.double().unflatten(0, (len(self.summary["questions"]), -1)).nanmean(1).float()

    def means(self, role: str) -> Float[Tensor, "question layer d_model"]:
        """Question means of a role's answers; NaN where none is in role.

        Raises:
            UnknownNameError: no such role.
        """
        names = [r["name"] for r in self.summary["roles"]]
        if role not in names:
            raise UnknownNameError("role", role, names)
        return read_tensors(self.path / "means" / f"{names.index(role):03d}.safetensors")["means"]

    def vectors(self, role: str) -> PersonaVectors:
        """A role's vector: its answers minus the default assistant's, on the same questions.

        Raises:
            GeometryError: the role is in role on fewer than six questions.
        """
        return axis_of(role, self.means(role) - self.default_means, self._provenance, "response_mean")

    def space(self) -> PersonaSpace:
        """All roles that have vectors, side by side.

        Raises:
            GeometryError: there is none.
        """
        return persona_space([self.vectors(r) for r in self.kept], self.neutral)

    def assistant_axis(self) -> PersonaVectors:
        """The Assistant Axis (arXiv 2601.10387): default assistant minus the mean of the roles in role, question by question.

        Raises:
            GeometryError: too few questions have roles.
        """
        roles = torch.stack([self.means(r) for r in self.kept]).double().nanmean(0).float()
        return axis_of(ASSISTANT_AXIS, self.default_means - roles, {**self._provenance, "roles": self.kept}, "response_mean")

    @cached_property
    def _default(self) -> Float[Tensor, "sample layer d_model"]:
        return read_tensors(self.path / "neutral.safetensors")["response_mean"]

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        manifest = read_manifest(self.path)
        return {"model": manifest["model"], "arguments": manifest["arguments"]}


def extract_roles(
    model: ChatModel,
    roles: RoleSet | None = None,
    *,
    judge: RoleJudge | None = None,
    out: str | Path | None = None,
    settings: RoleSettings | None = None,
    progress: Progress | None = None,
) -> RoleRun:
    """Let the model play every role, judge the answers, and keep the residuals of those in role.

    Args:
        roles: default: the set that ships for this model.
        judge: default: the oracle for the pocket model; any other model needs one.
        out: run folder; default `runs/roles-{model}-{set}-seed{seed}`. An interrupted run in it goes on.

    Raises:
        PersonaLensError: no judge, or a folder of another run.
        GeometryError: fewer than three roles are ever in role.
    """
    roles = roles or load_roles(model.trait_set)
    judge = judge or default_role_judge(model.trait_set)
    settings = settings or RoleSettings()
    content = digest(roles.model_dump_json(by_alias=True))
    chosen = {k: v for k, v in vars(settings).items() if k not in ("batch_rows", "batch_tokens", "sampling")}
    arguments = {"roles": roles.name, "roles_hash": content, "judge": judge.name, "sampling": vars(settings.sampling), **chosen}
    path = Path(out) if out else Path("runs") / f"roles-{Path(model.name).name}-{roles.name}-seed{settings.seed}"
    folder = RunFolder.open(path, command="roles", arguments=arguments, model=model.identity)
    if not (path / "roles.json").exists():
        with progress_bars() as bars:
            _Roles(model, roles, judge, settings, folder, progress or bars).run()
    return RoleRun(path)


def load_role_run(path: str | Path) -> RoleRun:
    """Reopen role vectors.

    Raises:
        RunFolderError: the folder holds none, or they are not finished.
    """
    folder = Path(path)
    require_finished(folder, "roles", "roles.json")
    return RoleRun(folder)


@dataclass(frozen=True)
class _Roles:
    """The stages over one open folder."""

    model: ChatModel
    roles: RoleSet
    judge: RoleJudge
    settings: RoleSettings
    folder: RunFolder
    progress: Progress

    def run(self) -> None:
        default = self._default_rows()
        rows = [*default, *(row for number in range(len(self.roles.roles)) for row in self._rows(number))]
        rollouts = self._sampled(rows)
        values = self._judged(rows, rollouts, len(default))
        self._neutral(rows[: len(default)], rollouts[: len(default)])
        per_role = self.settings.samples * len(self.roles.questions)
        summary: list[dict[str, Any]] = []
        for number, role in enumerate(self.roles.roles):
            at = range(len(default) + number * per_role, len(default) + (number + 1) * per_role)
            kept = [
                i for i in at if (v := values[i - len(default)]) is not None and v >= self.settings.least and rollouts[i].token_ids
            ]
            self._means(number, [rows[i] for i in kept], [rollouts[i] for i in kept])
            grades = [values[i - len(default)] for i in at]
            summary.append(
                {
                    "name": role.name,
                    "adherence": [grades.count(g) for g in range(4)],
                    "unjudged": grades.count(None),
                    "questions": len({rows[i][0].question for i in kept}),
                }
            )
            self.progress("residuals", number + 1, len(self.roles.roles))
        if sum(r["questions"] >= MINIMUM_QUESTIONS for r in summary) < 3:
            raise GeometryError(
                f"fewer than 3 of {len(summary)} roles have answers judged {self.settings.least} or more on {MINIMUM_QUESTIONS} "
                f"questions (judgements are in {self.folder.path}): lower `least`, or raise `samples`, in another folder"
            )
        write_json(self.folder.path / "roles.json", {"questions": list(self.roles.questions), "roles": summary})

    def _default_rows(self) -> list[Row]:
        return [
            (Prompt(f"roles/default/-/q{q:02d}", DEFAULT, "neutral", None, q, None, text), i)
            for q, text in enumerate(self.roles.questions)
            for i in range(self.settings.default_samples)
        ]

    def _rows(self, number: int) -> list[Row]:
        """A role's prompts: its instructions in turn."""
        role = self.roles.roles[number]
        made: list[Row] = []
        for q, text in enumerate(self.roles.questions):
            for i in range(self.settings.samples):
                k = i % len(role.instructions)
                name = f"roles/{role.name}/i{k}/q{q:02d}"
                made.append((Prompt(name, role.name, "positive", k, q, role.instructions[k], text), i))
        return made

    def _sampled(self, rows: Sequence[Row]) -> list[Rollout]:
        def answered(chunk: range) -> list[dict[str, Any]]:
            some = [rows[i] for i in chunk]
            s = self.settings
            return [r.as_dict() for r in sample(self.model, some, s.sampling, seed=s.seed, batch_rows=s.batch_rows)]

        total = len(rows)
        self.folder.fill("rollouts.jsonl", total, answered, chunk=CHUNK_ROWS, told=lambda n: self.progress("answers", n, total))
        return read_rollouts(self.folder.path / "rollouts.jsonl")

    def _judged(self, rows: Sequence[Row], rollouts: Sequence[Rollout], first: int) -> list[int | None]:
        """Adherence of every answer in a role (the default assistant's are not judged), role by role."""
        per_role = self.settings.samples * len(self.roles.questions)

        def graded(chunk: range) -> list[dict[str, Any]]:
            role = self.roles.roles[chunk.start // per_role]
            told = self.judge(role, self.roles.rubric, [Judged(rows[first + i][0].user, rollouts[first + i].text) for i in chunk])
            if len(told) != len(chunk):
                raise PersonaLensError(
                    f"the judge of roles returned {len(told)} grades for {len(chunk)} answers: one each, in order"
                )
            return [
                {"key": rollouts[first + i].key, "adherence": a.value, "reason": a.reason} for i, a in zip(chunk, told, strict=True)
            ]

        total = per_role * len(self.roles.roles)
        self.folder.fill("scores.jsonl", total, graded, chunk=per_role, told=lambda n: self.progress("adherence", n, total))
        return [r["adherence"] for r in read_jsonl(self.folder.path / "scores.jsonl")]

    def _pooled(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> Float[Tensor, "sample layer d_model"]:
        """Response means; NaN for answers without tokens."""
        found = torch.full((len(rows), self.model.n_layers, self.model.d_model), torch.nan)
        there = [i for i, r in enumerate(rollouts) if r.token_ids]
        spans = [rollout_span(self.model, rows[i][0], rollouts[i]) for i in there]
        for pooled in pool(self.model, spans, batch_tokens=self.settings.batch_tokens):
            found[[there[i] for i in pooled.indices]] = pooled.values[:, 0]
        return found

    def _neutral(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> None:
        path = self.folder.path / "neutral.safetensors"
        if path.exists():
            return
        values = self._pooled(rows, rollouts)
        write_atomically(path, lambda temporary: save_file({"response_mean": values}, temporary))

    def _means(self, number: int, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> None:
        path = self.folder.path / "means" / f"{number:03d}.safetensors"
        if path.exists():
            return
        values = self._pooled(rows, rollouts).double()
        asked = torch.tensor([p.question for p, _ in rows], dtype=torch.long)
        shape = (len(self.roles.questions), self.model.n_layers, self.model.d_model)
        means = torch.full(shape, torch.nan)
        for q in asked.unique().tolist():
            means[q] = values[asked == q].mean(0).float()
        write_atomically(path, lambda temporary: save_file({"means": means}, temporary))
