"""What runs were measured to be, kept in one folder: Parquet files that several programs may write, read by DuckDB."""

from workbench.results.front import HIGHER_IS_BETTER
from workbench.results.results import Results
from workbench.results.schema import COLUMNS, VERSION, Column, Row, key_of

__all__ = ["COLUMNS", "HIGHER_IS_BETTER", "VERSION", "Column", "Results", "Row", "key_of"]
