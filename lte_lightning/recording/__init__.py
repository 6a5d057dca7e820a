"""What a run leaves behind: results, tables, figures, its log."""
