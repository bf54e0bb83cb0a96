"""The HTML report of a run."""

from moe_jax.report.write import write_report

__all__ = ["write_report"]
