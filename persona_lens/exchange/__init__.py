"""Files of other programs: the paper's tensors, tables and traits, GGUF control vectors, steering-vectors, assistant-axis.

Readers trust nothing: sizes and shapes are checked, nothing is executed, and what a format does not hold stays open and is said
in notes. Writers return notes on what the format cannot hold.
"""

from persona_lens.exchange.assistant_axis import Capping, Ceiling, read_axis, read_capping, write_axis, write_capping
from persona_lens.exchange.files import FORMATS, Format, format_of, read_vectors, write_vectors
from persona_lens.exchange.gguf import control_directions, from_control_vector, read_gguf, write_gguf
from persona_lens.exchange.imported import Imported
from persona_lens.exchange.paper import paper_file_name, read_paper_vectors, write_paper_pair, write_paper_vectors
from persona_lens.exchange.paper_rows import (
    PaperRollout,
    ProjectionColumn,
    projection_name,
    read_projections,
    read_rollouts,
    write_projections,
    write_rollouts,
)
from persona_lens.exchange.steering_vectors import (
    from_steering_vector,
    read_steering_vector,
    to_steering_vector,
    write_steering_vector,
)

__all__ = [
    "FORMATS",
    "Capping",
    "Ceiling",
    "Format",
    "Imported",
    "PaperRollout",
    "ProjectionColumn",
    "control_directions",
    "format_of",
    "from_control_vector",
    "from_steering_vector",
    "paper_file_name",
    "projection_name",
    "read_axis",
    "read_capping",
    "read_gguf",
    "read_paper_vectors",
    "read_projections",
    "read_rollouts",
    "read_steering_vector",
    "read_vectors",
    "to_steering_vector",
    "write_axis",
    "write_capping",
    "write_gguf",
    "write_paper_pair",
    "write_paper_vectors",
    "write_projections",
    "write_rollouts",
    "write_steering_vector",
    "write_vectors",
]
