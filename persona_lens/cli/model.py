"""`persona-lens model`: whether a model can be hosted, how it is talked to, and what memory it takes."""

from typing import Annotated, Any

import typer

from persona_lens.cli.options import Device, Json, emit, load, printable


def model(
    name: Annotated[str, typer.Argument(help='"pocket", a Hugging Face hub id, a local folder, or the folder of an adapter.')],
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Load a model with all checks, and say what they found.

    Example: persona-lens model Qwen/Qwen2.5-7B-Instruct
    """
    from persona_lens.models import estimate_memory

    loaded = load(name, device)
    memory = estimate_memory(loaded.hf.config, loaded.hf.dtype)
    marks = [printable(str(loaded.tokenizer.decode([i]))) for i in loaded.stop_ids]
    record: dict[str, Any] = {
        **loaded.identity,
        "architecture": type(loaded.hf).__name__,
        "device": str(loaded.device),
        "context": loaded.context,
        "stops": marks,
        "system_role": loaded.template.system_role,
        "parameters": memory.parameters,
        "cache_per_token": memory.cache_per_token,
    }
    system = "has a role" if loaded.template.system_role else "begins the first user message, as the template has no role for it"
    thinks = "on" if loaded.template.thinking else "off" if loaded.template.switchable else "not known to the template"
    lines = [
        f"{loaded.name}: {record['architecture']}, {loaded.n_layers} layers of {loaded.d_model}, {record['dtype']}",
        "checks: logits and residuals equal plain transformers; the chat template keeps its prompts and renders one BOS at most",
        f"system prompt: {system}; thinking: {thinks}; context: {loaded.context or 'not said'}",
        f"answers end at {' or '.join(marks)}",
        f"parameters: {memory.parameters / 1e9:.3g} billion; cache: {memory.cache_per_token / 1024:.3g} KiB per token of a row",
        f"lineage: {loaded.fingerprint.lineage}; weights: {loaded.fingerprint.weights}",
    ]
    emit(record, "\n".join(lines), as_json)
