"""What people look at: HTML pages, aligned columns, the report of a run, runs side by side."""
