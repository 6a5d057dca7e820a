"""Records a run: results, tables, figures, and its log."""
