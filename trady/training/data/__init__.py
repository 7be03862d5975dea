"""Data sets: Hub, folder, CSV, Parquet, TSV, ``.npz``."""
