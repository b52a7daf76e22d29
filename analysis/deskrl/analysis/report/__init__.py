"""Report pages: one self-contained HTML page about a run (`report_page`) or an evaluation (`evaluation_page`)."""
