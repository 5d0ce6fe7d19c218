"""A run's model to take home: written, read again from what was written, and held against the policy that was trained."""

from gemma_grpo.export.exporting import Exported, export
from gemma_grpo.export.staging import ExportError

__all__ = ["ExportError", "Exported", "export"]
