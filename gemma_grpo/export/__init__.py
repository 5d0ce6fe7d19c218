"""A run's model to take home: written, read again from what was written, and held against the policy that was trained."""

from gemma_grpo.export.exporting import Exported, ExportError, export

__all__ = ["ExportError", "Exported", "export"]
